"""Every public function on inputs that are not what it was made for: docs/limits.md.

A loader without end, one with nothing, NaN, another device, half precision, two outputs: each is
refused by name with the sim as it was, or gives the number that the plain case gives.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.nn.modules import custom
from deployed import folder_of, quantized
from tiny import FAST, VOCAB, assert_same, copied, gpt2, shaken, simulate, state
from tiny import tokens as random_ids
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import aimet_quadapter
from aimet_quadapter import (
    CpuSession,
    DataError,
    FinetuneConfig,
    SimError,
    analytic_alphas,
    apply_quadapter,
    assign_bits,
    attach,
    calibrate,
    calibration_samples,
    choose_ranges,
    compare_generation,
    compensate_softmax,
    coverage,
    detach,
    evaluate_tasks,
    export,
    export_generation,
    find_pairs,
    finetune,
    fold,
    generate_on_cpu,
    load_default,
    perplexity,
    prepare,
    set_norm_weight_bits,
    set_ranges,
    set_residual_bits,
    set_table_bits,
    verify,
)
from aimet_quadapter.device.generator import Generation, Generator
from aimet_quadapter.errors import QuadapterError
from aimet_quadapter.sim import samples as reading

IDS = random_ids(2, 8, seed=1)
SHIFT = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
STEPS = FinetuneConfig(steps=2)
HALVES = (torch.bfloat16, torch.float16)


class Model(nn.Module):
    """Token ids (B, T), and floats (B, T, 16) to be added → logits, and what they come from."""

    def __init__(self, outputs: str = "logits") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outputs = outputs
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.embed = nn.Embedding(VOCAB, 16)
        self.add = custom.Add()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 24)
        self.act = nn.ReLU()
        self.down = nn.Linear(24, 128)  # wider than the vocabulary: it could be taken for logits
        self.last_norm = nn.LayerNorm(128)
        self.head = nn.Linear(128, VOCAB)

    def forward(self, ids: Tensor, shift: Tensor | None = None) -> Any:
        x = self.embed(ids)
        x = x if shift is None else self.add(x, shift)
        hidden = self.down(self.act(self.up(self.norm(x))))
        found = {"hidden": hidden, "logits": self.head(self.last_norm(hidden))}
        names = self.outputs.split()
        return tuple(found[name] for name in names) if len(names) > 1 else found[names[0]]


@copied
def plain(dtype: torch.dtype = torch.float32, outputs: str = "logits") -> QuantizationSimModel:
    """The sim of `Model`, its ranges set."""
    model = shaken(Model(outputs)).to(dtype)
    sim = QuantizationSimModel(model, (IDS, SHIFT.to(dtype)), config_file="default")
    sim.compute_encodings(lambda m: m(IDS, SHIFT.to(dtype)))
    return sim


@copied
def decoder(dtype: torch.dtype = torch.float32) -> QuantizationSimModel:
    """The sim of a prepared GPT-2, every operation quantized, its ranges set."""
    sim = simulate(prepare(gpt2(layers=1).to(dtype)), "htp_v73")
    sim.compute_encodings(lambda m: m(IDS))
    return sim


def dtype_of(sim: Any) -> torch.dtype:
    return next(sim.model.parameters()).dtype


def batch(sim: Any) -> tuple[Tensor, ...]:
    return (IDS, SHIFT.to(dtype_of(sim))) if isinstance(sim.model, Model) else (IDS,)


def by_hand(sim: Any) -> Any:
    """Pairs of a sim, and an α for each."""
    pairs = find_pairs(sim, batch(sim))
    return pairs, {p.name: torch.full((p.channels,), 1.5) for p in pairs}


def trained(sim: Any, loader: Any) -> list[float]:
    done = finetune(sim, loader, by_hand(sim)[0], config=STEPS)
    detach(sim)
    return [loss for _, loss in done.curve]


def applied(sim: Any, loader: Any, **more: Any) -> list[float]:
    result = apply_quadapter(sim, loader, calibration=FAST, **more)
    return [len(result.pairs), *[r.loss for r in result.calibration.results]]


def scales(sim: Any, loader: Any, method: str) -> list[float]:
    alphas = analytic_alphas(sim, loader, by_hand(sim)[0], method)
    return torch.cat(list(alphas.values())).tolist()


def ranges(sim: Any, loader: Any) -> list[float]:
    set_ranges(sim, loader)
    quantizers = [m.output_quantizers[0] for _, m in sim.named_qmodules()]
    return [float(q.get_max()) for q in quantizers if q is not None]


def compensated(sim: Any, loader: Any) -> list[float]:
    return [a.shift.error for a in compensate_softmax(sim, loader).attentions]


def compensated_on(sim: Any, range_loader: Any) -> list[float]:
    done = compensate_softmax(sim, [batch(sim)], range_loader)
    return [a.range[1] for a in done.attentions if a.range is not None]


def learned(sim: Any, loader: Any) -> list[float]:
    return [r.loss for r in calibrate(sim, loader, by_hand(sim)[0], FAST).results]


@dataclass(frozen=True)
class Case:
    """A function that reads a loader, as the numbers that come of it."""

    name: str
    numbers: Callable[[Any, Any], list[float]]
    build: Callable[..., Any] = plain
    stream: bool = False  # reads as many batches as its steps need


READERS = [
    Case("find_pairs", lambda sim, x: [p.channels for p in find_pairs(sim, samples=x)]),
    Case("calibrate", learned),
    Case("apply_quadapter", applied),
    Case(
        "apply_quadapter",
        lambda sim, x: applied(sim, [batch(sim)], finetune_loader=x, finetuning=STEPS),
        stream=True,
    ),
    Case("analytic_alphas", lambda sim, x: scales(sim, x, "cle")),
    Case("analytic_alphas", lambda sim, x: scales(sim, x, "smoothquant")),
    Case("set_ranges", ranges),
    Case("choose_ranges", lambda sim, x: [choose_ranges(sim, x, candidates=2).loss]),
    Case("choose_ranges", lambda sim, x: [choose_ranges(sim, x, loss="distillation").loss]),
    Case("assign_bits", lambda sim, x: [assign_bits(sim, x, 1, candidates=2).loss]),
    Case("finetune", trained, stream=True),
    Case("compensate_softmax", compensated, decoder),
    Case("compensate_softmax", compensated_on, decoder),
]

CASES = [pytest.param(c, id=f"{i} {c.name}") for i, c in enumerate(READERS)]


class Endless(IterableDataset):
    def __init__(self, item: Any) -> None:
        self.item = item

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.item)


def with_nan(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (*given[:-1], given[-1] * float("nan"))


LOADERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a generator without end": (itertools.repeat, "yielded 8 batches, does not say how many"),
    "a DataLoader without end": (
        lambda b: DataLoader(Endless(b), batch_size=None),
        "yielded 8 batches, does not say how many",
    ),
    "nothing": (lambda _: [], "yields no (samples|batches)"),
    "an iterator that has ended": (lambda _: iter(()), "yields no (samples|batches)"),
    "an empty batch": (lambda b: [tuple(x[:0] for x in b)], r"input 0 of batch 0 is empty"),
    "NaN": (lambda b: [with_nan(b)], "of batch 0 holds NaN or inf"),
    "NaN in the second batch": (lambda b: [b, with_nan(b)], "of batch 1 holds NaN or inf"),
    "another device": (
        lambda b: [tuple(x.to("meta") for x in b)],
        r"input 0 of batch 0 is on meta, the model on cpu\. Move it",
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("case", CASES)
def test_a_loader_that_nothing_can_be_learned_from_is_refused(case, kind, monkeypatch) -> None:
    monkeypatch.setattr(reading, "MOST_BATCHES", 8)
    make, message = LOADERS[kind]
    sim = case.build()
    loader = make(batch(sim))
    if case.stream and "without end" in kind:
        assert case.numbers(sim, loader)
        return
    before = state(sim)
    with pytest.raises(DataError, match=message):
        case.numbers(sim, loader)
    assert_same(sim, before)


def broken(sim: Any) -> Any:
    """The sim with NaN in one weight, which a quantizer makes a number of."""
    module = sim.model.up if isinstance(sim.model, Model) else sim.model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        module.weight[1, 2] = float("nan")
    return sim


@pytest.mark.parametrize("case", CASES)
def test_weights_with_nan_are_refused(case) -> None:
    sim = broken(case.build())
    ranges_before = {n: (q.get_min(), q.get_max()) for n, q in sim.named_quantizers()}
    with pytest.raises(QuadapterError, match="NaN or inf"):
        case.numbers(sim, [batch(sim)])
    for name, quantizer in sim.named_quantizers():
        assert torch.equal(quantizer.get_min(), ranges_before[name][0]), name
        assert torch.equal(quantizer.get_max(), ranges_before[name][1]), name


WHOLE: dict[str, Callable[[Any, Path], object]] = {
    "attach": lambda sim, _: attach(sim, *by_hand(decoder())),
    "compare_generation": lambda sim, _: compare_generation(sim, SAID),
    "evaluate_tasks": lambda sim, _: evaluate_tasks(sim, load_default()[1], ["choice"]),
    "export": lambda sim, to: export(sim, batch(sim), to),
    "export_generation": lambda sim, to: export_generation(
        sim, to, prompt_length=8, cache_length=16
    ),
    "fold": lambda sim, _: fold(sim, *by_hand(decoder())),
    "perplexity": lambda sim, _: perplexity(sim, IDS[:1], 8, progress=False),
    "set_residual_bits": lambda sim, _: set_residual_bits(sim),
    "set_table_bits": lambda sim, _: set_table_bits(sim),
    "set_norm_weight_bits": lambda sim, _: set_norm_weight_bits(sim),
}
"""Functions of a sim that read no loader."""

SAID = Generation((1, 2), (3, 4), None, (0.0,))


@pytest.mark.parametrize("name", WHOLE)
def test_weights_with_nan_are_refused_without_a_loader(name, tmp_path) -> None:
    with pytest.raises(SimError, match="NaN or inf"):
        WHOLE[name](broken(decoder()), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_nan_in_a_buffer_and_weights_without_data_are_refused() -> None:
    sim = plain()
    sim.model.register_buffer("mean", torch.tensor([float("-inf"), float("nan")]))
    with pytest.raises(SimError, match="buffer mean holds NaN"):
        set_ranges(sim, [batch(sim)])
    with pytest.raises(SimError, match=r"parameter .* has no data \(device 'meta'\)"):
        perplexity(Model().to("meta"), IDS[:1], progress=False)


def test_an_alpha_beyond_the_type_is_refused() -> None:
    sim = plain(torch.float16)
    pairs, alphas = by_hand(sim)
    before = state(sim)
    large = {name: alpha * 1e6 for name, alpha in alphas.items()}
    for put in (attach, fold):
        with pytest.raises(SimError, match="takes it beyond its type"):
            put(sim, pairs, large)
        assert_same(sim, before)


TENSORS: dict[str, Callable[[Any, Any, Path], object]] = {
    "calibration_samples": lambda _, x, __: calibration_samples(x[0][0], 1, 4, 0),
    "calibration_samples, exclude": lambda _, x, __: calibration_samples(
        IDS[0], 1, 4, 0, exclude=x[0]
    ),
    "coverage": lambda sim, x, _: coverage(sim, x),
    "CpuSession": lambda _, x, to: CpuSession(folder_of(quantized("Relu"), to / "relu")).run(
        x[1][:, :4, :8]
    ),
    "export": lambda sim, x, to: export(sim, x, to / "out"),
    "export, reference": lambda sim, x, to: export(sim, batch(sim), to / "out", reference=x),
    "find_pairs": lambda sim, x, _: find_pairs(sim, x),
    "perplexity": lambda sim, x, _: perplexity(sim, x[0][:1], progress=False),
}
"""Functions that are given tensors, not a loader."""


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to("meta"), "on meta|no data"),
        (lambda x: x * float("nan"), "NaN|are integers"),
    ],
    ids=["another device", "NaN"],
)
def test_tensors_without_values_are_refused(name, change, message, tmp_path) -> None:
    sim = plain()
    with pytest.raises(DataError, match=message):
        TENSORS[name](sim, tuple(change(x) for x in batch(sim)), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [n for n in TENSORS if "exclude" not in n])  # it may be empty
def test_tensors_with_nothing_in_them_are_refused(name, tmp_path) -> None:
    sim = plain()
    with pytest.raises(DataError, match=r"is empty|0 token"):
        TENSORS[name](sim, tuple(x[:, :0] for x in batch(sim)), tmp_path)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_half_precision_model_gives_what_an_fp32_model_gives(case, dtype) -> None:
    half, full = case.build(dtype), case.build()
    got = case.numbers(half, [batch(half)])
    # Of bfloat16's 8 bits; a block error is a small difference of rounded values.
    assert got == pytest.approx(case.numbers(full, [batch(full)]), rel=0.15, abs=1e-3)
    assert dtype_of(half) == dtype


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_half_precision_model_without_a_loader(dtype, tmp_path) -> None:
    sim = decoder(dtype)
    for name in ("export", "export_generation"):
        with pytest.raises(SimError, match="float32 models only"):
            WHOLE[name](sim, tmp_path / "out")
    for name in ("compare_generation", "set_residual_bits", "set_table_bits", "attach"):
        WHOLE[name](sim, tmp_path)
    assert WHOLE["perplexity"](decoder(dtype), tmp_path) == pytest.approx(
        WHOLE["perplexity"](decoder(), tmp_path), rel=0.02
    )
    half, full = (
        [r for r in coverage(s).rows if r.operation != "function"] for s in (sim, decoder())
    )
    assert len(half) == len(full)


TWO = ("logits hidden", "hidden logits")


@pytest.mark.parametrize("outputs", TWO)
@pytest.mark.parametrize("case", [c for c in CASES if c.values[0].build is plain])
def test_a_second_output_changes_no_number(case, outputs) -> None:
    two, one = plain(outputs=outputs), plain()
    got = case.numbers(two, [batch(two)])
    assert got == pytest.approx(case.numbers(one, [batch(one)]), rel=1e-6)


@pytest.mark.parametrize("outputs", TWO)
def test_a_second_output_changes_no_perplexity(outputs) -> None:
    ids = IDS.reshape(-1)
    expected = perplexity(plain(), ids, 8, progress=False)
    assert perplexity(plain(outputs=outputs), ids, 8, progress=False) == expected


def test_an_output_that_cannot_be_logits_is_refused() -> None:
    sim = plain(outputs="hidden logits")
    sim.model.config = SimpleNamespace()  # nothing says how many columns the logits have
    sim.model.down = nn.Linear(24, 16)
    sim.model.last_norm, sim.model.head = nn.LayerNorm(16), nn.Linear(16, VOCAB)
    with pytest.raises(DataError, match="has 16 columns and the text holds token"):
        perplexity(sim.model, IDS[:1], 8, progress=False)
    with pytest.raises(DataError, match="these are no logits"):
        assign_bits(sim, [IDS], 1)


def test_the_logits_of_two_outputs_are_exported_and_verified(tmp_path) -> None:
    sim = plain(outputs="hidden logits")
    folder = export(sim, IDS[:1], tmp_path / "out")
    report = verify(folder, sim=sim, htp=False, progress=False)
    checks = {check.name: check for check in report.checks}
    assert checks["QDQ on CPU = sim"].ok
    assert checks["sim = exported sim"].ok
    assert checks["perplexity"].ok


def test_a_prompt_without_values_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Generator, "on_cpu", lambda _: Generator.__new__(Generator))
    with pytest.raises(DataError, match=r"no data \(device 'meta'\)"):
        generate_on_cpu("out", IDS[0].to("meta"), 1)
    with pytest.raises(DataError, match="token ids are integers"):
        generate_on_cpu("out", IDS[0] * float("nan"), 1)


def test_a_loss_that_is_no_number_is_refused_before_anything_is_chosen() -> None:
    sim = plain()
    for choose in (lambda x: choose_ranges(sim, x), lambda x: assign_bits(sim, x, 1)):
        with pytest.raises(DataError, match="the loss is inf before anything is changed"):
            choose([(IDS[:, :1], SHIFT[:, :1])])  # no token to predict


APART = {
    # read texts and files
    "check_disjoint", "check_text", "check_vocabulary", "default_code", "default_text",
    "load_default", "load_text", "prompt_prefix", "report", "tokens",
    # read a folder; tensors go through CpuSession, the generator and perplexity
    "compile_for_htp", "generate_on_cpu", "generate_on_htp", "perplexity_on_cpu",
    "perplexity_on_htp", "run_on_cpu", "run_on_htp", "verify",
    # change a prepared model before there is a sim: tests/transforms
    "choose_prefix", "choose_rotation", "rotate", "set_prefix",
    # compute nothing
    "detach", "fold_adapter", "keep_module_sites", "prepare", "save_huggingface",
    "weights_restored",
}  # fmt: skip


def test_no_public_function_is_forgotten() -> None:
    functions = {n for n in aimet_quadapter.__all__ if n.islower() and not n.startswith("_")}
    tried = {c.name for c in READERS} | set(WHOLE) | {n.split(",")[0] for n in TENSORS}
    assert functions - tried == APART
    for name in tried:
        assert "docs/limits.md" in inspect.getdoc(getattr(aimet_quadapter, name)), name
