"""What each tier of `quadapter run` costs and gives, beside what it was estimated to cost.

    python benchmarks/tiers.py fast default best      # the embedded model
    python benchmarks/tiers.py fast --name smollm2 -- ./smollm2 --length 256 --no-export

Each run is a process of its own; its `result.json`, stamped, is the result. What else the machine
does is not seen: it is the load average that the stamp has.
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tiers"
CODE = ("aimet_quadapter", "benchmarks", "setup.py")


def main() -> None:
    """Run the tiers one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tiers", nargs="+", help="fast, default, best, paper")
    parser.add_argument("--name", help="beginning of the results' names (the tier alone)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (%(default)s)")
    own = sys.argv[1:]
    own, given = (own[: own.index("--")], own[own.index("--") + 1 :]) if "--" in own else (own, [])
    args = parser.parse_args(own)
    args.results.mkdir(parents=True, exist_ok=True)
    for tier in args.tiers:
        file = args.results / f"{f'{args.name}_' if args.name else ''}{tier}.json"
        file.write_text(json.dumps(measured(tier, given), indent=1) + "\n", encoding="utf-8")
        print(f"written to {file}", flush=True)


def measured(tier: str, given: list[str]) -> dict[str, object]:
    """The `result.json` of a run, with a stamp and without names of this machine's folders."""
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        command = [sys.executable, "-m", "aimet_quadapter", "run", "--tier", tier, *given]
        subprocess.run([*command, "--output", str(output)], check=True, cwd=ROOT)
        result: dict[str, object] = json.loads((output / "result.json").read_text("utf-8"))
    recipe = result["recipe"]
    assert isinstance(recipe, dict)
    for key in ("model", "output", "text_dir"):
        recipe[key] = recipe[key] and Path(recipe[key]).name
    return result | {
        "stamp": {
            "git": {
                "commit": git("rev-parse", "HEAD"),
                "dirty": bool(git("status", "--porcelain", *CODE)),
            },
            "hardware": {
                "machine": platform.machine(),
                "cores": os.cpu_count(),
                "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            },
            "load_average": {"before": before, "after": os.getloadavg()},
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    }


def git(*command: str) -> str:
    """What git prints."""
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
