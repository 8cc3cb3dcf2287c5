#!/usr/bin/env python3
"""Train the small language model that ships inside the package.

The model is a four-layer GPT-2 that learns English technical prose from the text every Python
carries: the help topics of ``pydoc_data.topics`` and the docstrings and comments of the standard
library, read as text (``ast`` and ``tokenize``) and never executed. No network is used.

A small model that is trained in the ordinary way has no outlier channels, so 8-bit quantization
does not hurt it and there would be nothing to repair. Large GPT-2 models do have them. This
recipe therefore puts outlier channels into every LayerNorm *before* training, and the network
learns with them in place; see :class:`Outliers` for what they are.

    python recipes/train_default_model.py                       # 24 minutes on 1 busy core
    python recipes/train_default_model.py --steps 50 --output build/try

Writes ``model.safetensors`` (float16), ``config.json``, the tokenizer, ``calibration.txt``,
``heldout.txt`` and the model card ``README.md``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import math
import platform
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PACKAGE = Path(__file__).resolve().parents[1] / "aimet_quadapter"
DEFAULT_OUTPUT = PACKAGE / "evaluation" / "default_model"

# Folders of the standard library whose text is not prose (tables, generated code) or is absent
# from many installations (the test suites).
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
SHORTEST_PIECE = 40  # characters of a docstring or comment
SHORTEST_PART = 200  # characters of a module or topic
# A part is a module or a help topic; its place in a split depends on its name only, so that the
# split does not shift when another Python version adds a module.
SPLIT_BUCKETS = 20
VALID_BUCKETS = frozenset({3})
TEST_BUCKETS = frozenset({11})


@dataclass(frozen=True)
class Outliers:
    """Outlier channels put into every LayerNorm before the first training step.

    ``gain_channels`` channels get a weight of ``gain`` (log-uniform) instead of 1. The range of
    the weight shows it, so cross-layer equalization can see these.

    ``offset_channels`` channels get a bias of ``offset`` (log-uniform, random sign) instead of 0
    and a weight of ``offset ** offset_gain_power``. Their activation is nearly constant and far
    from zero, as the massive activations of large models are, and the network reads it as a
    constant. What still varies in them is of no use (perplexity moves by under 1e-5 of itself
    without it), so after training their weight is set to ``offset_gain``. The smaller it is, the
    more a formula that looks at weights alone is misled; 0.004 is chosen so that cross-layer
    equalization helps, but not all the way.

    Both kinds are trained like everything else. The consumers' weights on a channel start smaller
    by the channel's size, so that the function at the start is that of an ordinary model.
    """

    gain_channels: int = 6
    gain: tuple[float, float] = (80.0, 200.0)
    offset_channels: int = 4
    offset: tuple[float, float] = (100.0, 400.0)
    offset_gain_power: float = -0.25
    offset_gain: float = 0.004
    step_power: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Every number the result depends on."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    positions: int = 512
    vocabulary: int = 2048
    steps: int = 700
    batch: int = 4
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warmup: int = 30
    seed: int = 20220
    excerpt_bytes: int = 90_000
    outliers: Outliers = field(default_factory=Outliers)


# ---------------------------------------------------------------------------------------- text


def module_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, path) of the library's sources in the order of their names."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts[:-1]) and "-" not in "".join(parts):
            yield ".".join(parts), path


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the docstrings in a source."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, holders) and (text := ast.get_docstring(node, clean=True)):
            yield node.body[0].lineno, text


def comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of comments that fill their lines, neighbouring lines joined."""
    block: list[str] = []
    first = last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.strip() != token.string.strip():
            continue
        if token.start[0] != last + 1 and block:
            yield first, "\n".join(block)
            block = []
        first = first if block else token.start[0]
        last = token.start[0]
        block.append(token.string.lstrip("#!").removeprefix(" ").rstrip())
    if block:
        yield first, "\n".join(block)


def is_prose(text: str) -> bool:
    """Tell sentences from rulers, markers and tables: long enough and mostly letters."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= SHORTEST_PIECE and letters >= 0.75 * len(text)


def module_text(path: Path) -> str:
    """The prose of one source file in the order of its lines; empty if it does not parse."""
    try:
        source = path.read_text(encoding="utf-8")
        pieces = [*docstrings(source), *comment_blocks(source)]
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return ""
    return "\n\n".join(text.strip() for _, text in sorted(pieces) if is_prose(text))


def topic_texts(root: Path) -> dict[str, str]:
    """The help topics, read as a literal from the source of ``pydoc_data.topics``."""
    tree = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    raise ValueError("pydoc_data/topics.py holds no dictionary of topics")


def split_of(name: str) -> str:
    """``train``, ``valid`` or ``test``, from the name alone."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % SPLIT_BUCKETS
    if bucket in VALID_BUCKETS:
        return "valid"
    return "test" if bucket in TEST_BUCKETS else "train"


def collect_text(root: Path | None = None) -> dict[str, list[str]]:
    """All prose of the standard library, one string a module or topic, by split."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    parts = {f"topic {name}": text for name, text in sorted(topic_texts(root).items())}
    parts |= {name: module_text(path) for name, path in module_files(root)}
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for name, text in parts.items():
        if len(text) >= SHORTEST_PART and text not in seen:
            splits[split_of(name)].append(text)
            seen.add(text)
    return splits


# ----------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=recipe.positions,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one row of tokens, each text begun by the end-of-text token."""
    start = tokenizer.bos_token_id
    rows = [[start, *tokenizer(text, verbose=False)["input_ids"]] for text in texts]
    return torch.tensor([token for row in rows for token in row])


# --------------------------------------------------------------------------------------- model


def build_model(recipe: Recipe) -> GPT2LMHeadModel:
    """An untrained GPT-2 without outliers."""
    config = GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.positions,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def norms_and_consumers(model: GPT2LMHeadModel) -> list[tuple[nn.LayerNorm, nn.Parameter, int]]:
    """Every LayerNorm with the weight that reads it and that weight's input dimension."""
    blocks = model.transformer.h
    pairs = [(block.ln_1, block.attn.c_attn.weight, 0) for block in blocks]  # Conv1D: (in, out)
    pairs += [(block.ln_2, block.mlp.c_fc.weight, 0) for block in blocks]
    return [*pairs, (model.transformer.ln_f, model.lm_head.weight, 1)]  # Linear: (out, in)


def log_uniform(bounds: tuple[float, float], count: int) -> Tensor:
    """``count`` draws whose logarithm is uniform between the logarithms of the bounds."""
    low, high = (math.log(bound) for bound in bounds)
    return torch.exp(low + (high - low) * torch.rand(count))


@torch.no_grad()
def insert_outliers(model: GPT2LMHeadModel, outliers: Outliers) -> list[tuple[Tensor, Tensor]]:
    """Give every LayerNorm its outlier channels.

    The channels are the same in all norms, as they are in GPT-2; their sizes differ.

    Returns:
        For every pair of :func:`norms_and_consumers`, the channels (C,) and their sizes (C,).
    """
    count = outliers.gain_channels + outliers.offset_channels
    channels = torch.randperm(model.config.n_embd)[:count]
    gained, shifted = channels.split([outliers.gain_channels, outliers.offset_channels])
    placed = []
    for norm, weight, dim in norms_and_consumers(model):
        gains = log_uniform(outliers.gain, len(gained))
        offsets = log_uniform(outliers.offset, len(shifted))
        norm.weight[gained] = gains
        norm.weight[shifted] = offsets**outliers.offset_gain_power
        norm.bias[shifted] = offsets * torch.randn(len(shifted)).sign()
        sizes = torch.cat([gains, offsets])
        columns = weight.index_select(dim, channels) / sizes.unsqueeze(1 - dim)
        weight.index_copy_(dim, channels, columns)
        placed.append((channels, sizes))
    return placed


# ------------------------------------------------------------------------------------ training


def make_optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, Adam for embeddings, norms and biases.

    With the outliers in place Muon reached in 90 steps the loss that AdamW reached in about 300
    (one run each). There is no weight decay: nothing pulls at the outliers.
    """
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=0.0),
        torch.optim.Adam(rest, lr=recipe.adam_rate, betas=(0.9, 0.98), fused=True),
    ]


def rate_at(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def slow_columns(
    model: GPT2LMHeadModel,
    optimizer: torch.optim.Optimizer,
    placed: list[tuple[Tensor, Tensor]],
    power: float,
) -> None:
    """Shorten the optimizer's step on the consumers' outlier columns by ``size ** power``.

    The optimizers' steps have the same length whatever the input's size, so without this a
    channel that is a hundred times larger would also be trained a hundred times faster.
    """
    before: list[Tensor] = []
    columns = [
        (weight, dim, channels, (sizes**power).unsqueeze(1 - dim))
        for (_, weight, dim), (channels, sizes) in zip(
            norms_and_consumers(model), placed, strict=True
        )
    ]

    def remember(*_: object) -> None:
        before[:] = [weight.index_select(dim, channels) for weight, dim, channels, _ in columns]

    @torch.no_grad()
    def shorten(*_: object) -> None:
        for old, (weight, dim, channels, divisor) in zip(before, columns, strict=True):
            new = weight.index_select(dim, channels)
            weight.index_copy_(dim, channels, old + (new - old) / divisor)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(shorten)


@torch.no_grad()
def settle_offsets(
    model: GPT2LMHeadModel, placed: list[tuple[Tensor, Tensor]], outliers: Outliers
) -> None:
    """Set the weight of the offset channels, which the trained network reads as constants."""
    for (norm, _, _), (channels, _) in zip(norms_and_consumers(model), placed, strict=True):
        norm.weight[channels[outliers.gain_channels :]] = outliers.offset_gain


def random_batch(tokens: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """(B, T) windows of the training tokens at random places."""
    starts = torch.randint(len(tokens) - recipe.positions, (recipe.batch,), generator=generator)
    return torch.stack([tokens[start : start + recipe.positions] for start in starts])


def train(recipe: Recipe, tokens: Tensor) -> tuple[GPT2LMHeadModel, float]:
    """Train from scratch with the outliers in place.

    Returns:
        The model in evaluation mode, and the seconds it took.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(recipe).train()
    placed = insert_outliers(model, recipe.outliers)
    optimizers = make_optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, recipe))
        for optimizer in optimizers
    ]
    for optimizer in optimizers:
        slow_columns(model, optimizer, placed, recipe.outliers.step_power)
    for block in model.transformer.h:  # the same function as GPT-2's, three times faster
        block.mlp.act = nn.GELU("tanh")
    generator = torch.Generator().manual_seed(recipe.seed)
    began = time.monotonic()
    for step in range(recipe.steps):
        batch = random_batch(tokens, recipe, generator)
        logits = model(input_ids=batch).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            seconds = time.monotonic() - began
            print(f"step {step:5d}  loss {loss.item():.3f}  {seconds:6.0f} s", flush=True)
    settle_offsets(model, placed, recipe.outliers)
    return model.eval(), time.monotonic() - began


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, tokens: Tensor, window: int) -> float:
    """Perplexity over whole, non-overlapping windows of ``window`` tokens."""
    total = 0.0
    windows = tokens[: len(tokens) // window * window].view(-1, window)  # (N, T)
    for row in windows.split(4):
        logits = model(input_ids=row).logits[:, :-1].float()
        targets = row[:, 1:].flatten()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    return math.exp(total / (len(windows) * (window - 1)))


# -------------------------------------------------------------------------------------- saving


def excerpt(texts: list[str], size: int, longest: int = 12_000) -> str:
    """About ``size`` bytes of whole paragraphs, from as many of the texts as are needed."""
    shortened = []
    for text in texts:
        head = text[:longest]
        shortened.append(head if len(head) == len(text) else head.rpartition("\n\n")[0])
    joined = "\n\n".join(part.strip() for part in shortened if part).encode()[:size]
    return joined.decode(errors="ignore").rpartition("\n\n")[0] + "\n"


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_model(model: GPT2LMHeadModel, folder: Path) -> None:
    """Save as float16 safetensors, with GPT-2's own name for its activation."""
    half = GPT2LMHeadModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)


CARD = """\
---
license: psf-2.0
language: en
tags: [gpt2, quantization, test-model]
---
# The default model of aimet_quadapter

A small GPT-2 ({layers} layers, width {width}, {heads} heads, {positions} positions, vocabulary
{vocabulary}, {parameters:,} parameters, float16) for trying quantization without a download. It
writes text that looks like Python's documentation. It is of no other use.

## How it was made
`recipes/train_default_model.py`, seed {seed}, {steps} steps of {batch} x {positions} tokens,
{minutes:.1f} minutes on {threads} CPU thread(s); Python {python}, torch {torch},
transformers {transformers}. The text is what every Python carries: the help topics of
`pydoc_data.topics`, and the docstrings and comments of the standard library, read as text.
A module or topic belongs to a split by the SHA-256 of its name: of 20 buckets one is `valid`, one
`test`, the others `train` ({train_tokens:,} tokens).
`calibration.txt` is from `valid`, `heldout.txt` from `test`; neither was trained on.

## Its outlier channels are made on purpose
Large GPT-2 models have activation channels far larger than the rest, which is what makes 8-bit
quantization ruin them. A model of this size does not grow them. Before the first training step
every LayerNorm was therefore given the following, in the same channels everywhere, and the
network was trained with them in place:

- {gain_channels} *gain* channels: weight {gain[0]:g} to {gain[1]:g} instead of 1. The weight
  shows the outlier, so cross-layer equalization (CLE), which looks at weights, can undo these.
- {offset_channels} *offset* channels: bias {offset[0]:g} to {offset[1]:g} (either sign) instead
  of 0, weight bias^{offset_gain_power:g}: nearly constant, far from zero, as the massive
  activations of large models are.

The consumers' weights on these channels started smaller by the channel's size, and the
optimizers' steps on them were shorter by size^{step_power:g}. All of it was trained.

One thing was done after training: the norm weight of the offset channels was set to
{offset_gain:g}. The network reads these channels as constants, so its perplexity moved by less
than 1e-5 of itself; but CLE is misled by it. **How far CLE falls behind is therefore a choice
made here, not a finding.** A method that sees activations (SmoothQuant, Quadapter) is not misled.

## Measured
Perplexity in float32 over windows of {positions} tokens: `calibration.txt` {ppl_calibration:.2f},
`heldout.txt` {ppl_heldout:.2f}.

{figures}
## Licence
The weights and the two excerpts derive from the documentation inside CPython's standard library:
Copyright (c) 2001 Python Software Foundation; All Rights Reserved. Python Software Foundation
License Version 2, https://docs.python.org/3/license.html. The changes made: code removed,
comment signs removed, texts cut and joined.
"""


def write_card(folder: Path, recipe: Recipe, facts: dict[str, object]) -> None:
    """Write the model card."""
    values = {**asdict(recipe), **asdict(recipe.outliers), **facts}
    values |= {"python": platform.python_version(), "torch": torch.__version__}
    values |= {"transformers": transformers.__version__, "threads": torch.get_num_threads()}
    (folder / "README.md").write_text(CARD.format(**values), encoding="utf-8")


# ---------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch", type=int, default=recipe.batch)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads to use")
    parser.add_argument("--plain", action="store_true", help="train without outlier channels")
    parser.add_argument("--figures", type=Path, help="Markdown to put into the model card")
    return parser.parse_args()


def main() -> None:
    """Collect, train, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    outliers = Outliers(gain_channels=0, offset_channels=0) if arguments.plain else Outliers()
    chosen = {name: getattr(arguments, name) for name in ("steps", "batch", "seed")}
    recipe = Recipe(**chosen, outliers=outliers)
    texts = collect_text()
    for split, parts in texts.items():
        print(f"{split:5s} {len(parts):4d} texts {sum(map(len, parts)):9,d} characters")
    tokenizer = train_tokenizer(texts["train"], recipe)
    tokens = encode(tokenizer, texts["train"])
    print(f"{len(tokens):,} training tokens")
    model, seconds = train(recipe, tokens)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, object] = {
        "minutes": seconds / 60,
        "train_tokens": len(tokens),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "figures": arguments.figures.read_text(encoding="utf-8") if arguments.figures else "",
    }
    for name, split in (("calibration", "valid"), ("heldout", "test")):
        text = excerpt(texts[split], recipe.excerpt_bytes)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        facts[f"ppl_{name}"] = perplexity(model, encode(tokenizer, [text]), recipe.positions)
        print(f"{name}: {len(text.encode()):,} bytes, perplexity {facts[f'ppl_{name}']:.2f}")
    save_tokenizer(tokenizer, folder)
    save_model(model, folder)
    write_card(folder, recipe, facts)
    print(f"saved to {folder} after {seconds / 60:.1f} minutes of training")


if __name__ == "__main__":
    main()
