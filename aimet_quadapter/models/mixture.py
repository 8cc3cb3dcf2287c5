"""A mixture of experts without a branch on values: every expert runs, most of them times 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from aimet_torch.nn.modules.custom import Add, Divide, MaskedFill, Multiply, Sum
from torch import Tensor, nn

from .activations import activation
from .description import MLP
from .parts import Parts
from .weight_map import WeightMap


class Expert(nn.Module):
    """down(activation(gate x) · up x)."""

    def __init__(
        self, mlp: MLP, number: int, path: str, held: str, weights: WeightMap, scale: float
    ) -> None:
        super().__init__()
        stack = weights.parameter(f"{held}.gate_up_proj")
        width = stack.shape[1] // 2
        build = weights.expert
        gate_up, down = f"{held}.gate_up_proj", f"{held}.down_proj"
        self.gate_proj = build(f"{path}.gate_proj", gate_up, number, slice(0, width))
        self.up_proj = build(f"{path}.up_proj", gate_up, number, slice(width, None))
        self.act = activation(mlp.activation)
        self.mul = Multiply()
        self.down_proj = build(f"{path}.down_proj", down, number, slice(None), scale)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.mul(self.act(self.gate_proj(x)), self.up_proj(x)))
        return y


class Mixture(Parts):
    """Σ_e p_e · expert_e(x), with p the softmax scores of the chosen experts and 0 for the others.

    Every expert is computed: a device runs a fixed graph, and a weight that some tokens do not
    reach must have its range and its α all the same.
    """

    def __init__(
        self, mlp: MLP, parts: Mapping[str, str], path: str, weights: WeightMap, scale: float
    ) -> None:
        super().__init__()
        self.mlp = mlp
        inside = parts["mlp"]
        router, experts = (parts[p].removeprefix(f"{inside}.") for p in ("router", "experts"))
        self.put("router", router, weights.router(f"{path}.{parts['router']}"))
        held = f"{path}.{parts['experts']}"
        every = (Expert(mlp, e, f"{held}.{e}", held, weights, scale) for e in range(mlp.experts))
        self.put("experts", experts, nn.ModuleList(every))
        self.softmax = nn.Softmax(dim=-1)
        self.choose = MaskedFill()
        if mlp.normalized:
            self.sum = Sum()
            self.normalize = Divide()
        self.weigh = nn.ModuleList(Multiply() for _ in range(mlp.experts))
        self.add = nn.ModuleList(Add() for _ in range(mlp.experts - 1))

    def readers(self) -> list[nn.Linear]:
        """Router, then gates and ups of all experts."""
        experts = self.part("experts")
        return [self.part("router"), *(p for e in experts for p in (e.gate_proj, e.up_proj))]

    def writers(self) -> list[nn.Linear]:
        """Downs of all experts."""
        return [e.down_proj for e in self.part("experts")]

    def forward(self, x: Tensor) -> Tensor:
        probs = self.softmax(self.part("router")(x))  # (B, T, E)
        last = torch.topk(probs, self.mlp.experts_per_token, dim=-1).values[..., -1:]
        probs = self.choose(probs.clone(), probs < last, 0.0)  # AIMET's fills in place
        if self.mlp.normalized:
            probs = self.normalize(probs, self.sum(probs, dim=-1, keepdim=True))
        total: Tensor | None = None
        for e, expert in enumerate(self.part("experts")):
            part = self.weigh[e](expert(x), probs[..., e : e + 1])
            total = part if total is None else self.add[e - 1](total, part)
        assert total is not None
        return total
