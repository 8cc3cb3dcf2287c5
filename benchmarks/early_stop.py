"""How the error of each pair falls in phase 1, for what stopping early would save and cost.

    python benchmarks/early_stop.py                                # the embedded model, W8A8
    python benchmarks/early_stop.py FOLDER --layers 8 --bits 4 16  # a model's first layers

The conditions are those of `peers.py`; nothing is stopped here. A run is added to the file.
"""

from __future__ import annotations

from pathlib import Path

from file_of_runs import add_run, bench_of

from aimet_quadapter import CalibrationConfig, calibrate, find_pairs

FILE = Path(__file__).parent / "results" / "cost" / "early_stop.json"


def main() -> None:
    """Learn all pairs of a model."""
    bench = bench_of(__doc__, FILE)
    config = CalibrationConfig(choice="block")
    sim = bench.sim()
    found = calibrate(sim, bench.samples, find_pairs(sim, samples=bench.samples), config)
    pairs = [
        {
            "pair": result.pair.name,
            "kind": result.pair.kind,
            "curve": result.curve,
            "seconds": result.seconds,
        }
        for result in found.results
    ]
    add_run(bench.args, config, "early_stop.py", {"pairs": pairs})


if __name__ == "__main__":
    main()
