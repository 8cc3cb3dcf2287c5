"""docs/performance.md is what its tables' results say."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def writer() -> ModuleType:
    path = ROOT / "docs" / "write_performance.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(file: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"))


def text() -> str:
    return re.sub(r"\s+", " ", (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))


def test_the_page_is_what_the_results_make_of_it() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page == writer().page()


def test_the_bound_of_memory_is_kept_and_said() -> None:
    found = recorded("cost/larger_than_memory.json")
    own = [stage["own"] for stage in found["stages_mib"].values()]
    assert max(own) - found["imported_mib"]["own"] < found["bound_mib"]
    assert found["parameters"] > 2e9
    for figure in (found["model_mib"], found["bound_mib"], 2 * found["parts_mib"]["head"]):
        assert f"{figure:,.0f} MiB".replace(",", " ") in text()
    assert f"all {sum(found['pairs'].values())} pairs" in text()


def test_ranks_have_the_alphas_of_one_process() -> None:
    found = recorded("cost/ranks.json")
    assert found["same to the bit"]
    (one,), (first, second) = found["ranks"].values()
    assert first["pairs"] + second["pairs"] == one["pairs"]
    assert max(first["cpu_seconds"], second["cpu_seconds"]) < 0.75 * one["cpu_seconds"]
