"""What other quantizers of HuggingFace models gain from folded weights.

    python benchmarks/strangers.py --python VENV/bin/python --original embedded --folded DIR

DIR is what `quadapter fold` wrote, in this environment; VENV has llm-compressor and auto-round in
their own versions, without aimet_quadapter. Each quantizes the original and the folded checkpoint
with the same settings, text and samples: `tests/strangers/` has the programs. One JSON file a
quantizer and scheme comes into --output, with both perplexities, settings and versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aimet_quadapter
from aimet_quadapter.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.record import git_state

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = Path(aimet_quadapter.__file__).parent / "evaluation" / "default_model"
"""The embedded model, with text for it."""
PROGRAMS = {
    "llm-compressor": ROOT / "tests" / "strangers" / "in_llmcompressor.py",
    "auto-round": ROOT / "tests" / "strangers" / "in_auto_round.py",
}
"""Quantizer → what is run in its environment."""
CODE = ("aimet_quadapter", "benchmarks/strangers.py", "tests/strangers")
"""What makes a result "dirty" when it is not committed."""


def main() -> None:
    """Measure a quantizer on both checkpoints."""
    args = arguments()
    original = EMBEDDED if args.original == "embedded" else whole_path(args.original)
    texts = {
        "calibration": args.calibration_text or EMBEDDED / "calibration.txt",
        "evaluation": args.evaluation_text or EMBEDDED / "heldout.txt",
    }
    measured = {
        name: measure(args, folder, texts)
        for name, folder in (("original", original), ("folded", args.folded))
    }
    run = args.folded.with_name(f"{args.folded.name}.run") / "result.json"
    recipe = json.loads(run.read_text(encoding="utf-8"))
    name = args.name or ("embedded" if original == EMBEDDED else original.name)
    record = {
        "model": name,
        "quantizer": args.quantizer,
        "scheme": args.scheme,
        "samples": args.samples,
        "length": args.length,
        "eval_tokens": args.eval_tokens,
        **measured,
        "fold": {"recipe": without_paths(recipe["recipe"]), "versions": recipe["versions"]},
        "sha256": {
            "original": sha256(original / "model.safetensors"),
            "folded": sha256(args.folded / "model.safetensors"),
            **{text: sha256(file) for text, file in texts.items()},
        },
        "git": git_state(*CODE),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{name}_{args.scheme}_{args.quantizer.replace('-', '_')}.json"
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    cells = [f"{k} {v['fp32']:.2f} → {v['quantized']:.2f}" for k, v in measured.items()]
    print(f"{file.name}: {', '.join(cells)}")


def arguments() -> argparse.Namespace:
    """What is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--python", type=whole_path, required=True, help="of the other environment")
    add("--original", required=True, help="checkpoint, or embedded")
    add("--folded", type=whole_path, required=True, help="what quadapter fold wrote")
    add("--name", help="of the model in the results (its folder's)")
    add("--quantizer", choices=[*PROGRAMS], default="llm-compressor")
    add("--scheme", choices=["w8a8", "w4a16"], default="w8a8")
    add("--calibration-text", type=whole_path, help="UTF-8 file (the embedded text)")
    add("--evaluation-text", type=whole_path, help="UTF-8 file (the embedded text)")
    add("--samples", type=int, default=4)
    add("--length", type=int, default=512)
    add("--eval-tokens", type=int, default=2048)
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "strangers")
    return parser.parse_args()


def whole_path(given: str) -> Path:
    """The programs run in another folder. A link stays one: it gives the model its name."""
    return Path(given).absolute()


def measure(args: argparse.Namespace, folder: Path, texts: dict[str, Path]) -> dict[str, Any]:
    """Run the program of a quantizer on a checkpoint; what it found.

    Raises:
        DataError: the program failed; the message ends with what it wrote.
    """
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.json"
        command: list[str | Path] = [args.python, PROGRAMS[args.quantizer], folder]
        command += ["--calibration-text", texts["calibration"]]
        command += ["--evaluation-text", texts["evaluation"], "--scheme", args.scheme]
        command += ["--samples", str(args.samples), "--length", str(args.length)]
        command += ["--eval-tokens", str(args.eval_tokens), "--result", result]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
        if done.returncode:
            raise DataError(f"{args.quantizer} on {folder} failed:\n{done.stderr[-3000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the names of files, not where they lay."""

    def bare(value: Any) -> Any:
        if isinstance(value, list):
            return [bare(x) for x in value]
        return Path(value).name if isinstance(value, str) and "/" in value else value

    return {key: bare(value) for key, value in recipe.items()}


def sha256(file: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
