import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny import one_layer_gpt2, saved
from torch.testing import assert_close
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedTokenizerFast,
)

from aimet_quadapter import (
    DataError,
    UnsupportedModelError,
    default_text,
    load_default,
    prepare,
    set_ranges,
)
from aimet_quadapter.cli import main
from aimet_quadapter.cli.loading import Subject, behind, load, simulate, transform
from aimet_quadapter.cli.settings import resolve
from aimet_quadapter.cli.summary import next_steps
from aimet_quadapter.models.norms import norm_of
from aimet_quadapter.transforms import rotation_choice

ROOT = Path(__file__).parents[2]
QUICK = ["--samples", "2", "--length", "32", "--eval-tokens", "128", "--steps", "2", "--no-export"]
QUICK += ["--no-preflight", "--no-report"]  # have tests of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model with the embedded model's tokenizer."""
    return saved(one_layer_gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize("tier", ["default", "paper"])
def test_run_compares_and_records(
    folder: Path, tier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), *QUICK, "--tier", tier, "--output", str(tmp_path)]
    assert main(["run", *arguments, "--bits", "8", "16", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    for name in ("FP32", "PTQ", "Quadapter", "W8A16", "htp_v73", "aimet-torch"):
        assert name in printed
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(result["perplexity"]) == {"FP32", "PTQ", "Quadapter"}
    assert result["recipe"]["bits"] == [8, 16]
    assert result["recipe"]["calibration"]["steps"] == 2
    assert result["recipe"]["calibration"]["seed"] == 3
    assert result["recipe"]["calibration"]["keep_best"] is (tier == "default")
    assert {"load", "quantize", "quadapter"} <= set(result["seconds"])
    assert {"aimet_quadapter", "aimet-torch", "torch"} <= set(result["versions"])


def test_every_stage_is_measured_and_its_result_is_a_recipe(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(default_text("heldout")[:3000], encoding="utf-8")
    arguments = [str(folder), *QUICK, "--evaluation-text", str(text), "built-in code"]
    arguments += ["--compensate-softmax", "--choose-ranges", "--assign-bits", "1"]
    arguments += ["--finetune-text", "built-in", "--finetune-steps", "2", "--save-huggingface"]
    assert main(["run", *arguments, "--output", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "a" / "result.json").read_text(encoding="utf-8"))
    first, *stages = "Quadapter", "softmax", "ranges", "bits", "phase 2"
    rows = [" + ".join((first, *stages[:n])) for n in range(len(stages) + 1)]
    assert list(result["perplexity"]) == ["FP32", "PTQ", *rows]
    values = [tuple(row.values()) for row in result["perplexity"].values()]
    assert len(set(values)) > 4
    assert all(row.keys() == {"mine.txt", "built-in code"} for row in result["perplexity"].values())
    assert "fine-tuning: cross-entropy" in printed
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "a" / "huggingface")
    ids = torch.randint(3, 90, (1, 20))
    original = GPT2LMHeadModel.from_pretrained(folder)
    assert_close(loaded(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)

    repeat = ["--recipe", str(tmp_path / "a" / "result.json"), "--output", str(tmp_path / "b")]
    assert main(["run", *repeat]) == 0
    again = json.loads((tmp_path / "b" / "result.json").read_text(encoding="utf-8"))
    assert again["perplexity"] == result["perplexity"]
    assert again["recipe"] == result["recipe"] | {"output": str(tmp_path / "b")}


def test_fold_writes_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    quick = [a for a in QUICK if a != "--no-export"]
    target = tmp_path / "folded"
    assert main(["fold", str(folder), *quick, "-o", str(target)]) == 0
    loaded, original = (GPT2LMHeadModel.from_pretrained(f) for f in (target, folder))
    ids = torch.randint(3, 90, (1, 20))
    assert_close(loaded(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(loaded.transformer.ln_f.weight, original.transformer.ln_f.weight)
    assert (target / "tokenizer.json").exists()
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "| Quadapter |" in card
    assert str(folder) not in card
    result = json.loads((tmp_path / "folded.run" / "result.json").read_text(encoding="utf-8"))
    assert result["recipe"]["save_huggingface"]
    assert not result["recipe"]["export"]
    with pytest.raises(SystemExit):
        main(["fold", str(folder), "-o", str(target), "--opset", "21"])


def test_a_checkpoint_that_would_overwrite_another_is_refused_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "config.json").touch()
    command = ["run", str(folder), *QUICK, "--save-huggingface", "--output", str(tmp_path)]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert "huggingface" in printed.err
    assert printed.out == ""


def test_run_exports(folder: Path, tmp_path: Path) -> None:
    arguments = [a for a in QUICK if a != "--no-export"] + ["--residual-bits", "16"]
    for _ in range(2):  # the second replaces what the first wrote
        assert main(["run", str(folder), *arguments, "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.rglob("*.encodings"))) == 1
    assert (tmp_path / "export" / "tokenizer.json").exists()
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text(encoding="utf-8"))
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert manifest["perplexities"] == {n: v["built-in"] for n, v in result["perplexity"].items()}
    assert len(manifest["pairs"]) == 3
    assert manifest["quantizers"]["output"]["16 bits"] == 5  # sum of embeddings, 2 writers, 2 sums
    assert manifest["operations_without_encoding"] == []


def test_run_on_a_terminal_that_is_ascii(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    assert main(["run", str(folder), *QUICK, "--output", str(tmp_path / "é")]) == 0
    printed = written.getvalue().decode("ascii")
    assert "aimet_quadapter 0.1.0 | aimet-torch " in printed
    assert "2 x 32 tokens" in printed
    assert rf"written to {tmp_path}/\xe9" in printed


def test_the_next_command_survives_any_folder() -> None:
    for name in ("my model", "it's", "$HOME;ls", "α"):
        verify, compiled, converted = next_steps(Path(name), 22).splitlines()
        assert shlex.split(verify) == ["next:", "quadapter", "verify", name]
        assert shlex.split(compiled) == ["next:", "quadapter", "compile", name]
        words = shlex.split(converted)
        assert words[:3] == ["next:", "qairt-converter", "--input_network"]
        assert f"{name}/model.onnx" in words
        assert f"{name}/model.encodings" in words


def test_no_more_of_a_text_is_tokenized_than_needed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = default_text("heldout") * 12  # about 1 MB
    files = [tmp_path / f"{part}.txt" for part in "ab"]
    for file in files:
        file.write_text(text, encoding="utf-8")
    names = [str(file) for file in files]
    asked = {"model": str(folder), "calibration_text": names, "evaluation_text": names[:1]}
    settings = resolve(asked | {"samples": 2, "length": 40, "eval_tokens": 300, "device": "cpu"})
    given: list[int] = []
    tokenize = PreTrainedTokenizerFast.__call__

    def record(self: PreTrainedTokenizerFast, part: str, **options: object) -> object:
        given.append(len(part))
        return tokenize(self, part, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", record)
    subject = load(settings)
    tokenizer, samples = subject.tokenizer, subject.samples
    monkeypatch.undo()
    assert sum(given) < len(text) / 4
    whole = tokenizer(f"{text}\n\n{text}", return_tensors="pt", verbose=False).input_ids[0]
    assert torch.equal(samples[0][0], whole[:40])
    second = tokenizer(f"{text}\n\n{text}"[len(text) :][:1000], verbose=False).input_ids
    assert samples[1][0].tolist() in [second[i : i + 40] for i in range(20)]  # from the middle
    assert torch.equal(subject.texts["a.txt"], whole[:300])


def test_texts_of_one_file_name_stay_apart(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "t.txt"
        file.write_text(f"{name * 3}. {default_text('heldout')[:400]}", encoding="utf-8")
    names = [str(tmp_path / name / "t.txt") for name in ("a", "b")]
    asked = {"model": str(folder), "evaluation_text": [*names, "built-in"], "samples": 1}
    subject = load(resolve(asked | {"length": 16, "eval_tokens": 32, "device": "cpu"}))
    assert list(subject.texts) == ["a/t.txt", "b/t.txt", "built-in"]
    for name in ("a", "b"):
        text = subject.tokenizer.decode(subject.texts[f"{name}/t.txt"])
        assert text.startswith(f"{name * 3}.")


def test_a_checkpoint_that_has_no_place_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = load_default()
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = saved(MistralForCausalLM(MistralConfig(**size, **heads)), tmp_path / "mistral")
    quick = [a for a in QUICK if a != "--no-export"]
    target = tmp_path / "folded"
    command = ["fold", str(path), *quick, "-o", str(target)]
    assert main([*command, "--compensate-softmax"]) == 2
    printed = capsys.readouterr()
    assert "has no place for" in printed.err
    assert "\nPTQ " not in printed.out
    assert main(command) == 0
    card = (target / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card
    assert "computes in floating point what the original does" in card


def test_a_foreign_folder_is_refused_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.txt").touch()
    assert main(["run", str(folder), "--output", str(tmp_path)]) == 2
    assert "export" in capsys.readouterr().err
    assert (tmp_path / "export" / "thesis.txt").exists()


def test_wrong_input_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, binary, file = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "file"
    empty.write_text("", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00\xd8")
    file.write_text("", encoding="utf-8")
    output = ["--output", str(tmp_path / "out")]
    for arguments, message in [
        ([str(tmp_path / "nowhere"), *output], "nowhere"),
        ([str(folder), *output, "--calibration-text", str(tmp_path / "no.txt")], "no.txt"),
        ([str(folder), *output, "--calibration-text", str(binary)], "not UTF-8"),
        ([str(folder), *output, "--calibration-text", str(empty)], "0 tokens"),
        ([str(folder), *output, "--evaluation-text", str(empty)], "at least 2"),
        ([str(folder), *output, "--samples", "100000"], "(samples, length)"),
        ([str(folder), *output, "--config-file", "htp_v1"], "htp_v1"),
        ([str(folder), *output, "--device", "toaster"], "--device toaster"),
        ([str(folder), *output, "--window", "513"], "512 positions"),
        ([str(folder), *output, "--length", "513"], "512 positions"),
        ([str(folder), "--output", str(file)], str(file)),
    ]:
        assert main(["run", *arguments]) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if line.startswith("quadapter: error: ")]
        assert len(errors) == 1
        assert lines[-1] == errors[0]
        assert message in errors[0]


def test_an_unsupported_architecture_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = load_default()
    config = OpenAIGPTConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)
    path = saved(OpenAIGPTLMHeadModel(config), tmp_path / "gpt")
    assert main(["run", str(path), *QUICK, "--output", str(tmp_path / "out")]) == 2
    assert "OpenAIGPTLMHeadModel cannot be prepared" in capsys.readouterr().err


def test_a_llama_runs(tmp_path: Path) -> None:
    _, tokenizer = load_default()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = saved(LlamaForCausalLM(config), tmp_path / "llama")
    assert main(["run", str(path), *QUICK, "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "arguments",
    [[], ["run", "--bits", "8"], ["run", "--no-such-flag"]],
)
def test_wrong_arguments_are_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; from aimet_quadapter.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    command = [sys.executable, "-m", "aimet_quadapter", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("aimet_quadapter 0.")


def test_a_prefix_and_a_rotation_from_a_shell(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(folder), "--samples", "2", "--length", "32", "--eval-tokens", "64"]
    command += ["--steps", "2", "--output", str(tmp_path), "--rotate", "--prefix"]
    assert main([*command, "auto", "--no-export"]) == 0
    out = capsys.readouterr().out
    assert "spread, bits" in out
    assert main([*command, "5", "9"]) == 0
    out = capsys.readouterr().out
    assert "prefix [5, 9]" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["recipe"]["prefix"] == [5, 9]
    assert result["recipe"]["rotate"] == "hadamard"
    assert {"FP32", "FP32, prefix", "PTQ", "Quadapter"} == set(result["perplexity"])
    assert main([*command, "five"]) == 2
    assert "prefix is ['five']: pass token ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "more", "chosen", "rotate", "said"),
    [
        ("llama", {}, True, "", "spread, bits"),
        ("llama", {"rotate": "hadamard", "prefix": "none"}, False, "hadamard", ""),
        ("llama", {"prefix": "none", "rotate": "none"}, False, "none", ""),
        ("llama", {"tier": "paper"}, False, "none", ""),
        ("gemma3", {}, True, "none", "not rotated: the stream of Gemma3ForCausalLM cannot be"),
        ("gpt2", {}, False, "none", ""),
    ],
)
def test_models_with_rms_norms_get_a_prefix_and_a_rotation(
    family: str, more: dict[str, str], chosen: bool, rotate: str, said: str, capsys: Any
) -> None:
    model = prepare(FAMILIES[family]())
    samples = [torch.randint(3, 90, (1, 32)) for _ in range(2)]
    subject = Subject(model, None, load_default()[1], samples, samples, {}, [], 32, 32)
    logits = model(samples[0])
    transform(resolve(more), subject)
    out = capsys.readouterr().out
    assert ("spread, bits" in out) is chosen
    assert said in out
    table = re.search(r"^(\w+) .* chosen$", out.partition("divergence")[2], re.MULTILINE)
    assert subject.rotated == (rotate or (table and table[1]))
    assert ("divergence" in out) is (not rotate)
    if not model.prefix:
        assert_close(model(samples[0]), logits, rtol=1e-4, atol=1e-4)


def test_a_rotation_is_chosen_for_the_bits_that_the_model_will_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def note(sim: Any, samples: Any) -> None:
        weight = sim.model.model.layers[0].mlp.down_proj.param_quantizers["weight"]
        norm = sim.model.model.norm.param_quantizers["weight"]
        seen.append((weight.bitwidth, norm.bitwidth, bool(sim.model.rotation)))
        set_ranges(sim, samples)

    monkeypatch.setattr(rotation_choice, "set_ranges", note)
    samples = [torch.randint(3, 90, (1, 32)) for _ in range(2)]
    subject = Subject(prepare(FAMILIES["llama"]()), None, None, samples, [], {}, [], 32, 32)
    transform(resolve({"bits": [4, 16], "prefix": "none"}), subject)
    assert seen == [(4, 16, False), (4, 16, True)]


@pytest.mark.parametrize(
    ("bits", "given", "norms"),
    [((4, 16), None, 16), ((4, 8), None, 8), ((8, 8), None, 8), ((4, 16), 4, 4)],
)
def test_weights_of_norms_have_as_many_bits_as_activations(
    bits: tuple[int, int], given: int | None, norms: int
) -> None:
    settings = resolve({"bits": list(bits), "norm_weight_bits": given})
    for family in ("llama", "gpt2"):
        sim = simulate(settings, prepare(FAMILIES[family]()))
        found = {
            module.param_quantizers["weight"].bitwidth
            for _, module in sim.named_qmodules()
            if norm_of(module) is not None and module.param_quantizers["weight"]
        }
        assert found == {norms}


def test_a_rotation_that_is_asked_for_is_not_left_out() -> None:
    subject = Subject(prepare(FAMILIES["gemma3"]()), None, None, [], [], {}, [], 32, 32)
    with pytest.raises(UnsupportedModelError, match="cannot be rotated"):
        transform(resolve({"rotate": "hadamard", "prefix": "none"}), subject)


def test_a_prefix_that_leaves_out_the_tokenizers_own_beginning_is_refused() -> None:
    sample = torch.arange(8)[None]
    assert behind([0, 7], [0], sample).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert behind([7], [], sample).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    with pytest.raises(DataError, match="begin the prefix with it"):
        behind([7], [0], sample)
    with pytest.raises(DataError, match="a sample of 8 tokens has none behind a prefix of 8"):
        behind(list(range(8)), [], sample)
