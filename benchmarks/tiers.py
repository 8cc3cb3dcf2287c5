"""What each tier of `quadapter run` costs and gives, beside what it was estimated to cost.

    python benchmarks/tiers.py fast default best      # the embedded model
    python benchmarks/tiers.py fast --name smollm2 -- ./smollm2 --length 256 --no-export
    python benchmarks/tiers.py default --name tiny_llama --tiny

Each run is a process of its own; its `result.json`, stamped, is the result. With --cpu-time every
second that it estimates and records is one of the process on a core: what else the machine does is
not in them then, and with one thread (OMP_NUM_THREADS=1) they are what the clock shows on an idle
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from paper.record import git_state

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tiers"
CODE = ("aimet_quadapter", "benchmarks", "setup.py")


def main() -> None:
    """Run the tiers one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tiers", nargs="+", help="fast, default, best, paper")
    parser.add_argument("--name", help="beginning of the results' names (the tier alone)")
    parser.add_argument("--tiny", action="store_true", help="on a small random Llama")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the process")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (%(default)s)")
    own = sys.argv[1:]
    own, given = (own[: own.index("--")], own[own.index("--") + 1 :]) if "--" in own else (own, [])
    args = parser.parse_args(own)
    args.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = [tiny_llama(Path(folder) / "tiny-llama")] if args.tiny else []
        for tier in args.tiers:
            file = args.results / f"{f'{args.name}_' if args.name else ''}{tier}.json"
            result = measured(tier, [*model, *given], args.cpu_time)
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"written to {file}", flush=True)


def measured(tier: str, given: list[str], cpu_time: bool) -> dict[str, object]:
    """The `result.json` of a run, with a stamp and without names of this machine's folders."""
    before = os.getloadavg()
    clock = "import time; time.perf_counter = time.process_time; " if cpu_time else ""
    program = f"{clock}from aimet_quadapter.cli import main; raise SystemExit(main())"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        command = [sys.executable, "-c", program, "run", "--tier", tier, *given]
        subprocess.run([*command, "--output", str(output)], check=True)
        result: dict[str, object] = json.loads((output / "result.json").read_text("utf-8"))
    recipe = result["recipe"]
    assert isinstance(recipe, dict)
    for key in ("model", "output", "text_dir"):
        recipe[key] = recipe[key] and Path(recipe[key]).name
    return result | {
        "stamp": {
            "git": git_state(*CODE),
            "hardware": {
                "machine": platform.machine(),
                "cores": os.cpu_count(),
                "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            },
            "clock": "process" if cpu_time else "wall",
            "load_average": {"before": before, "after": os.getloadavg()},
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    }


def tiny_llama(folder: Path) -> str:
    """The random Llama of the tests with the embedded model's tokenizer, saved."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    from aimet_quadapter import load_default

    _, tokenizer = load_default()
    model = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    return str(tiny.saved(model, folder))


if __name__ == "__main__":
    main()
