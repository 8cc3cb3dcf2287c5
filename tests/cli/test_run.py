import argparse
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch.testing import assert_close
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from aimet_quadapter import DataError, UnsupportedModelError, default_text, load_default, prepare
from aimet_quadapter.cli import main
from aimet_quadapter.cli.loading import behind, load, transform
from aimet_quadapter.cli.program import _parser
from aimet_quadapter.cli.run import next_step

ROOT = Path(__file__).parents[2]
QUICK = ["--samples", "2", "--length", "32", "--eval-tokens", "128", "--steps", "2", "--no-export"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model with the embedded model's tokenizer."""
    model, tokenizer = load_default()
    config = model.config
    config.n_layer, config.n_embd, config.n_head = 1, 32, 2
    return save(GPT2LMHeadModel(config), tokenizer, tmp_path_factory.mktemp("gpt2"))


def save(model: PreTrainedModel, tokenizer: object, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_run_compares_and_records(
    folder: Path, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), *QUICK, "--preset", preset, "--output", str(tmp_path)]
    assert main(["run", *arguments, "--bits", "8", "16", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    for name in ("FP32", "PTQ", "Quadapter", "W8A16", "htp_v73", "aimet-torch"):
        assert name in printed
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(result["perplexity"]) == {"FP32", "PTQ", "Quadapter"}
    assert result["settings"]["bits"] == [8, 16]
    assert result["calibration"]["steps"] == 2
    assert result["calibration"]["seed"] == 3
    assert {"load", "quantize", "quadapter"} <= set(result["seconds"])
    assert {"aimet_quadapter", "aimet-torch", "torch"} <= set(result["versions"])


def test_run_exports(folder: Path, tmp_path: Path) -> None:
    arguments = [a for a in QUICK if a != "--no-export"] + ["--residual-bits", "16"]
    for _ in range(2):  # the second replaces what the first wrote
        assert main(["run", str(folder), *arguments, "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.rglob("*.encodings"))) == 1
    assert (tmp_path / "export" / "tokenizer.json").exists()
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text(encoding="utf-8"))
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert manifest["perplexities"] == result["perplexity"]
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
        words = shlex.split(next_step(Path(name), 22))
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
    arguments = {"calibration_text": files, "evaluation_text": files, "eval_tokens": 300}
    settings = {"samples": 2, "length": 40, "window": None, "no_bos": False}
    settings |= {"seed": 0, "device": "cpu"}
    given: list[int] = []
    tokenize = PreTrainedTokenizerFast.__call__

    def record(self: PreTrainedTokenizerFast, part: str, **options: object) -> object:
        given.append(len(part))
        return tokenize(self, part, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", record)
    args = argparse.Namespace(model=str(folder), **arguments, **settings)
    _, tokenizer, samples, evaluation = load(args)
    monkeypatch.undo()
    assert sum(given) < len(text) / 4
    whole = tokenizer(f"{text}\n\n{text}", return_tensors="pt", verbose=False).input_ids[0]
    assert torch.equal(samples[0][0], whole[:40])
    second = tokenizer(f"{text}\n\n{text}"[len(text) :][:1000], verbose=False).input_ids
    assert samples[1][0].tolist() in [second[i : i + 40] for i in range(20)]  # from the middle
    assert torch.equal(evaluation, whole[:300])


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
        ([str(folder), *output, "--samples", "100000"], "(--samples, --length)"),
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
    path = save(OpenAIGPTLMHeadModel(config), tokenizer, tmp_path / "gpt")
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
    path = save(LlamaForCausalLM(config), tokenizer, tmp_path / "llama")
    assert main(["run", str(path), *QUICK, "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "arguments",
    [[], ["run", "--bits", "8"], ["run", "--bits", "3", "8"], ["run", "--samples", "0"]],
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
    assert result["settings"]["prefix"] == [5, 9]
    assert result["settings"]["rotate"] == "hadamard"
    assert {"FP32", "FP32, prefix", "PTQ", "Quadapter"} == set(result["perplexity"])
    assert main([*command, "five"]) == 2
    assert "--prefix five: pass token ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "more", "chosen", "rotate", "said"),
    [
        ("llama", [], True, "hadamard", "spread, bits"),
        ("llama", ["--prefix", "none", "--rotate", "none"], False, "none", ""),
        ("llama", ["--preset", "paper"], False, "none", ""),
        ("gemma3", [], True, "none", "not rotated: the stream of Gemma3ForCausalLM cannot be"),
        ("gpt2", [], False, "none", ""),
    ],
)
def test_models_with_rms_norms_get_a_prefix_and_a_rotation(
    family: str, more: list[str], chosen: bool, rotate: str, said: str, capsys: Any
) -> None:
    model = prepare(FAMILIES[family]())
    args = vars(_parser().parse_args(["run", *more])) | {
        "begins_with": [],
        "length": 32,
        "window": 32,
    }
    args = argparse.Namespace(**args)
    samples = [torch.randint(3, 90, (1, 32)) for _ in range(2)]
    logits = model(samples[0])
    transform(args, model, load_default()[1], samples)
    out = capsys.readouterr().out
    assert ("spread, bits" in out) is chosen
    assert said in out
    assert args.rotate == rotate
    if not model.prefix:
        assert_close(model(samples[0]), logits, rtol=1e-4, atol=1e-4)


def test_a_rotation_that_is_asked_for_is_not_left_out() -> None:
    args = _parser().parse_args(["run", "--rotate", "--prefix", "none"])
    with pytest.raises(UnsupportedModelError, match="cannot be rotated"):
        transform(args, prepare(FAMILIES["gemma3"]()), None, [])


def test_a_prefix_that_leaves_out_the_tokenizers_own_beginning_is_refused() -> None:
    sample = torch.arange(8)[None]
    assert behind([0, 7], [0], sample).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert behind([7], [], sample).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    with pytest.raises(DataError, match="begin the prefix with it"):
        behind([7], [0], sample)
