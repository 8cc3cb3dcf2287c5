"""A sim's graph → the pairs in it, each proven exact; what was refused, with the reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from aimet_torch.quantization.base import QuantizerBase
from aimet_torch.utils import remove_all_quantizers
from torch import Tensor, nn

from ..models.norms import norm_of
from ..sim.inputs import example_inputs, variations
from ..sim.samples import as_samples, checked
from ..sim.trace import Node, Trace, recordings
from .flow import WEIGHTED, Flow, follow
from .pair import (
    BATCH_NORMS,
    Pair,
    Pairs,
    Refusal,
    Scale,
    consumer_scale,
    producer_scales,
)
from .proof import inexact
from .sharing import Sharing


def find_pairs(
    sim: Any,
    dummy_input: Any = None,
    kinds: Iterable[str] | None = None,
    names: str | None = None,
    *,
    samples: Iterable[Any] | None = None,
    unused: Iterable[str] = (),
) -> Pairs:
    """Find every pair in the graph of a sim and prove each.

    What no sample runs is not known: while a module that holds weights was not run, it might read
    any tensor, and every pair is refused with its name. A pair's α divides every module that reads
    the producer on any of the ways that the samples take.

    An endless or empty loader, NaN, another device, half precision, two outputs: docs/limits.md.

    Args:
        sim: an AIMET `QuantizationSimModel` of any torch model.
        dummy_input: what the sim was made with; needed only for a model that `prepare` did not
            make, whose inputs are not all float tensors, when there are no samples. A tuple is
            positional arguments, a dict keyword arguments.
        kinds: as in `Pairs.select`.
        names: as in `Pairs.select`.
        samples: yields inputs of the model, as `apply_quadapter`'s loader does: all ways that the
            model can take, such as every head and every expert.
        unused: patterns of modules that deployment never runs, such as `"vision_tower.*"`.

    Returns:
        The pairs, in order of execution, with the refused candidates: those that the graph rules
        out, and those that it promises but that change the model's output.

    Raises:
        SimError: not a sim, or an input is needed and was not given.
        DataError: a sample or `dummy_input` does not fit the model.
        PairError: the model returns nothing finite that could be compared.
    """
    inputs: list[Any] = [] if samples is None else [*as_samples(samples, sim.model)]
    if dummy_input is not None or not inputs:
        inputs.insert(0, checked(example_inputs(sim, dummy_input), sim.model, "dummy_input"))
    ways, examples, chosen = _ways(sim.model, inputs)
    sharing = Sharing(sim.model, ways)
    idle = _not_run(sim.model, ways, sharing, tuple(unused))
    found: list[Pair] = []
    refused: list[Refusal] = []
    with torch.no_grad(), remove_all_quantizers(sim.model):  # modules are run on labels
        for producer in _producers(ways):
            result = _pair(producer, ways, sharing)
            if isinstance(result, Refusal):
                refused.append(result)
            elif idle:
                refused.append(Refusal(producer, _may_read(idle)))
            else:
                found.append(result)
    pairs = Pairs(tuple(found), tuple(refused), idle).select(kinds, names)
    # A prepared model's own small inputs are varied, not samples of hundreds of tokens.
    varied = [example_inputs(sim)] if hasattr(sim.model, "dummy_input") else examples
    others = (x for sample in varied for x in variations(sim.model, sample))
    failed = inexact(sim, pairs, chosen, others)
    return pairs.without(failed) if failed else pairs


def nothing_found(pairs: Pairs, shown: int = 3) -> str:
    """That there is no pair to work on, with the first reasons."""
    reasons = "; ".join(str(r) for r in pairs.refused[:shown])
    return (
        f"no pair was found{f' ({reasons})' if reasons else ''}. print(find_pairs(sim, "
        "samples=calib_loader)) shows every candidate and why it was refused."
    )


def _ways(model: nn.Module, inputs: Sequence[Any]) -> tuple[list[Trace], list[Any], list[Any]]:
    """A recording of each way that the samples take, a sample of each, and all to prove on.

    On one way samples may still differ in lengths, or in which channels are cut out: that is
    not followed, but each such sample is proven.
    """
    found: dict[Any, tuple[Trace, Any]] = {}
    settings: dict[Any, Any] = {}
    for sample, trace in zip(inputs, recordings(model, inputs), strict=True):
        found.setdefault(trace.form, (trace, sample))
        settings.setdefault((trace.form, trace.settings), sample)
    traces, examples = zip(*found.values(), strict=True)
    return list(traces), list(examples), list(settings.values())


def _not_run(
    model: nn.Module, ways: list[Trace], sharing: Sharing, unused: tuple[str, ...]
) -> tuple[str, ...]:
    """Modules that hold weights which no recording reads, or only to compute nothing with."""
    ran = frozenset().union(*(trace.ran for trace in ways))
    idle = []
    for name, module in model.named_modules():
        inside = isinstance(module, QuantizerBase) or id(module) in ran
        if inside or not any(True for _ in module.parameters(recurse=False)):
            continue
        expected = any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)
        if not (expected or sharing.read_by_function(module)):
            idle.append(name)
    return tuple(idle)


def _may_read(idle: tuple[str, ...], shown: int = 3) -> str:
    more = f" and {len(idle) - shown} more" if len(idle) > shown else ""
    return (
        f"{', '.join(idle[:shown])}{more} hold weights and no sample ran them: they may read it. "
        "Give samples that run them (find_pairs(sim, samples=...)), or name those that are never "
        "run (unused=...)"
    )


def _producers(ways: Iterable[Trace]) -> list[str]:
    """Names of the modules that may be producers, in order of execution."""
    nodes = (n for trace in ways for n in trace.nodes if not n.empty)
    return list(dict.fromkeys(n.name for n in nodes if n.module and _may_produce(n.module)))


def _may_produce(module: nn.Module) -> bool:
    norms = (nn.LayerNorm, nn.RMSNorm, *BATCH_NORMS)  # of several dimensions too: refused by name
    return isinstance(module, (*norms, *WEIGHTED)) or norm_of(module) is not None


def _pair(producer: str, ways: list[Trace], sharing: Sharing) -> Pair | Refusal:
    """Join what becomes of one producer on every way."""
    flows = []
    for trace in ways:
        for node in trace.nodes:
            if node.name == producer and node.module is not None and not node.empty:
                flow = follow(trace, node, sharing)
                if isinstance(flow, str):
                    return Refusal(producer, flow)
                flows.append(flow)
    consumers = _consumers(flows, ways)
    return _assemble(flows, consumers)


def _consumers(flows: list[Flow], ways: list[Trace]) -> dict[str, tuple[Node, Tensor]]:
    """Consumer → one of its calls and its columns; blocks what is not the same on every way."""
    found: dict[str, tuple[Node, Tensor]] = {}
    for flow in flows:
        for node, columns in flow.consumers:
            known = found.setdefault(node.name, (node, columns))[1]
            if not torch.equal(known, columns):
                flow.block(torch.cat([known, columns]), f"{node.name} reads it in another order")
    readers = {id(flow.trace): {n.name for n, _ in flow.consumers} for flow in flows}
    for trace in ways:
        for name, (node, columns) in found.items():
            if id(node.target) in trace.ran and name not in readers.get(id(trace), ()):
                flows[0].block(columns, f"{name} reads something else on another way")
    return found


def _assemble(flows: list[Flow], consumers: dict[str, tuple[Node, Tensor]]) -> Pair | Refusal:
    start = flows[0].start
    assert start.module is not None
    blocked = {c: why for flow in reversed(flows) for c, why in flow.blocked.items()}
    reached = {int(c) for _, columns in consumers.values() for c in columns.unique()} - {-1}
    blocked.pop(-1, None)
    good = sorted(reached - blocked.keys())
    if not good:
        return Refusal(start.name, _why(blocked))
    total = flows[0].channels
    new = torch.full((total + 1,), -1)  # old label → place in α; the last entry serves −1
    new[torch.tensor(good)] = torch.arange(len(good))
    users = {name: (n, new[c]) for name, (n, c) in consumers.items() if (new[c] >= 0).any()}
    scales = list(producer_scales(start.name, start.module, new[:total]))
    for name, (node, columns) in users.items():
        assert node.module is not None
        scales.append(consumer_scale(name, node.module, columns))
    constants = {name: found for flow in flows for name, found in flow.constants.items()}
    for name, labels in constants.items():
        if (new[labels] >= 0).any():
            scales.append(Scale(name, "constant", new[labels], divide=False))
    ways = [nodes for flow in flows if (nodes := _nodes_between(flow, users))]
    ends = {start.name, *users}
    inner = {n.name: n for nodes in ways for n in nodes if n.name not in ends}
    return Pair(
        kind=_kind(flows, users, list(inner.values())),
        producer=start.name,
        consumers=tuple(users),
        channels=len(good),
        scales=tuple(scales),
        columns=tuple(c for _, c in users.values()),
        between=tuple(name for name, n in inner.items() if n.module is not None),
        ways=tuple(tuple((n.index - nodes[0].index, n.name) for n in nodes) for nodes in ways),
    )


def _why(blocked: dict[int, str]) -> str:
    if not blocked:
        return "no linear or convolution reads it"
    reasons = list(blocked.values())
    return max(dict.fromkeys(reasons), key=reasons.count)


def _nodes_between(flow: Flow, users: Collection[str]) -> list[Node]:
    """Operations on a way from the producer to a consumer, in order; none without a consumer."""
    ends = [node for node, _ in flow.consumers if node.name in users]
    needed = {n.index for n in ends}
    wanted = {v.index for n in ends for v in n.inputs}
    for index in sorted(flow.path, reverse=True):
        node = flow.path[index]
        inside = node is flow.start or not isinstance(node.module, WEIGHTED)
        if index not in needed and inside and any(v.index in wanted for v in node.outputs):
            needed.add(index)
            wanted |= {v.index for v in node.inputs}
    return [flow.path[i] for i in sorted(needed)]


def _kind(flows: list[Flow], users: Collection[str], inner: list[Node]) -> str:
    module = flows[0].start.module
    assert module is not None
    if norm_of(module):
        at_end = any(
            node.name in users and _ends(node, flow.trace, alone=len(users) == 1)
            for flow in flows
            for node, _ in flow.consumers
        )
        return "norm-head" if at_end else "norm-linear"
    if isinstance(module, BATCH_NORMS):
        return "norm-conv"
    names = {type(n.module).__name__.lower() if n.module else n.name.lower() for n in inner}
    if any(word in n for n in names for word in ("matmul", "bmm", "attention")):
        return "v-o"
    if any("mul" in n for n in names):
        return "up-down"
    family = "linear" if isinstance(module, nn.Linear) else "conv"
    return f"{family}-relu-{family}" if any("relu" in n for n in names) else f"{family}-{family}"


def _ends(node: Node, trace: Trace, alone: bool) -> bool:
    """Whether a consumer is a head.

    Its output is the model's, or it is the only one and no layer comes behind it (capped logits).
    """
    if any(v.index in trace.outputs for v in node.outputs):
        return True
    return alone and not any(isinstance(n.module, WEIGHTED) for n in trace.nodes[node.index + 1 :])
