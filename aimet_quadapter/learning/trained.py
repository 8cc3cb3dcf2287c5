"""What phase 2 trains: α, the ranges of AIMET's quantizers, and for QAT the weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from aimet_torch.quantization.affine import AffineQuantizerBase
from torch import Tensor

from ..config import FinetuneConfig
from ..errors import SimError
from ..models.prepended import Prepended
from ..pairs.attachment import values_restored
from ..pairs.pair import Pair
from .ranks import Ranks


class Trained:
    """The trained tensors: α as factors on the present weights, ends of the ranges, weights."""

    def __init__(
        self, sim: Any, pairs: tuple[Pair, ...], base: Mapping[str, Tensor], config: FinetuneConfig
    ) -> None:
        self.exp = config.parametrization == "exp"
        device = next(sim.model.parameters()).device
        self.alphas: dict[str, Tensor] = {}
        self.base: dict[str, Tensor] = {}
        for pair in pairs:
            one = torch.ones(pair.channels, device=device)
            self.base[pair.name] = base.get(pair.name, one).to(one)
            start = one.log() if self.exp else self.base[pair.name].clone()
            self.alphas[pair.name] = start.requires_grad_()
        self.ranges = _Ranges(sim, config) if config.lr_ranges else None
        self.weights = _weights(sim) if config.lr_weights else []
        groups: list[dict[str, Any]] = []
        if config.lr_alpha and self.alphas:
            groups.append({"params": list(self.alphas.values()), "lr": config.lr_alpha})
        if self.ranges is not None and self.ranges.parameters:
            groups.append({"params": self.ranges.parameters, "lr": config.lr_ranges})
        if self.weights:
            groups.append({"params": self.weights, "lr": config.lr_weights})
        if not groups:
            raise SimError(
                "there is nothing to train: the sim has no quantizers with a range to learn, and "
                "no pairs were given. Give pairs, or set lr_weights."
            )
        self.optimizer = torch.optim.Adam(groups)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(0.0, 1 - step / config.steps)
        )

    def factors(self) -> dict[str, Tensor]:
        """Pair name → factor on the present weights, differentiable in the trained tensors."""
        if self.exp:
            return {n: a.exp() for n, a in self.alphas.items()}
        return {n: a.clamp(min=1e-4) / self.base[n] for n, a in self.alphas.items()}

    def require_gradients(self) -> None:
        """Let backward passes reach the trained tensors of the sim."""
        for tensor in (*(self.ranges.ends if self.ranges else ()), *self.weights):
            tensor.requires_grad_(True)

    def weights_restored_on_error(self) -> AbstractContextManager[Any]:
        """Give the trained weights their bits back if the context ends with an exception."""
        return values_restored(self.weights, only_on_error=True)

    def average(self, ranks: Ranks) -> None:
        """Let all ranks have the mean of what their last backward passes left."""
        if self.ranges is not None:
            self.ranges.pull_gradients()
        ranks.average_gradients(self._parameters())

    def step(self) -> None:
        """One optimizer step on that."""
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ranges is not None:
            self.ranges.push_values()

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name: trained tensors and Adam's."""
        found = {f"value {i}": x for i, x in enumerate(self._parameters())}
        for i, x in enumerate(self._parameters()):
            found |= {f"adam {i} {k}": v for k, v in self.optimizer.state.get(x, {}).items()}
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on from what `state` gave after so many steps."""
        for i, x in enumerate(self._parameters()):
            x.copy_(state[f"value {i}"])
            begin = f"adam {i} "
            adam = {k.removeprefix(begin): v for k, v in state.items() if k.startswith(begin)}
            if adam:
                self.optimizer.state[x] = {
                    k: v.clone() if k == "step" else v.to(x) for k, v in adam.items()
                }
        self.schedule.last_epoch = step
        for group, rate in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = rate * self.schedule.lr_lambdas[0](step)
        if self.ranges is not None:
            self.ranges.push_values()

    def _parameters(self) -> list[Tensor]:
        return [x for group in self.optimizer.param_groups for x in group["params"]]


class _Ranges:
    """The ends of AIMET's ranges as trained tensors, plain or by their logarithm.

    With logarithms an end keeps its sign and moves by a share of itself: θ = ±exp(u), and
    ∂L/∂u = ∂L/∂θ · θ. An end at zero stays there.
    """

    def __init__(self, sim: Any, config: FinetuneConfig) -> None:
        self.log = config.log_ranges
        self.ends = [
            parameter
            for q in sim.quantizers()
            if isinstance(q, AffineQuantizerBase)
            for name, parameter in q.named_parameters(recurse=False)
            if name in ("min", "max") and q.is_overwrite_allowed(name)
        ]
        if self.log:
            self.signs = [e.detach().sign() for e in self.ends]
            self.parameters = [e.detach().abs().clamp(min=1e-30).log() for e in self.ends]
        else:
            self.parameters = list(self.ends)

    def pull_gradients(self) -> None:
        """AIMET's gradients → those of the trained tensors."""
        if not self.log:
            return
        for u, end in zip(self.parameters, self.ends, strict=True):
            u.grad = None if end.grad is None else end.grad * end.detach()
            end.grad = None

    @torch.no_grad()
    def push_values(self) -> None:
        """The trained tensors → AIMET's ranges."""
        if not self.log:
            return
        for u, end, sign in zip(self.parameters, self.ends, self.signs, strict=True):
            end.copy_(sign * u.exp())


def _weights(sim: Any) -> list[Tensor]:
    """The model's own parameters, those of its quantizers and a prefix's constants left out."""
    held = [m for m in sim.model.modules() if isinstance(m, Prepended)]
    left_out = {id(p) for m in (*sim.quantizers(), *held) for p in m.parameters()}
    return [p for p in sim.model.parameters() if id(p) not in left_out and p.is_floating_point()]
