import json
import re
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest

from aimet_quadapter.results.channel_chart import packed, unpacked
from aimet_quadapter.results.run_facts import (
    CoverageFacts,
    PairFacts,
    RunFacts,
    SiteFacts,
    StreamFacts,
)
from aimet_quadapter.results.run_page import write_run_page

LOSSES = {"ones": 0.5, "cle": 0.2, "smoothquant": 0.25, "learned": 0.03125, "halfway": 0.1}


def pair(number: int = 0, channels: int = 600, **changes: Any) -> PairFacts:
    """Some channels, one of them a hundred times as large as the others."""
    draw = np.random.default_rng(number)
    ends = np.stack((-draw.random(channels), draw.random(channels))).astype(np.float32)
    ends[:, 7] *= 100
    alpha = (0.1 + draw.random(channels)).astype(np.float32)
    given: dict[str, Any] = {
        "name": f"model.layers.{number}.a_long_name.input_layernorm -> q_proj, k_proj, v_proj",
        "kind": ("norm-linear", "up-down")[number % 2],
        "kept": "learned",
        "losses": LOSSES,
        "curve": [(0, 0.2), (10, 0.1), (20, 0.03125)],
        "crossed": 0,
        "alpha": alpha,
        "before": ends,
        "after": ends * alpha,
    }
    return PairFacts(**given | changes)


def stream(title: str, largest: float) -> StreamFacts:
    values = np.ones((12, 40), np.float32)
    values[5, 0] = largest
    return StreamFacts(title, [f"layers.{i}.add" for i in range(12)], ["<b>"] * 40, values)


def facts(**changes: Any) -> RunFacts:
    """A run with something in every part of its page."""
    given: dict[str, Any] = {
        "headline": [("model", "some/model: LlamaForCausalLM"), ("quantizers", "W8A8")],
        "perplexity": {
            "FP32": {"WikiText-2": 26.0, "PTB": 80.0},
            "FP32, prefix": {"WikiText-2": 25.0, "PTB": 80.5},
            "PTQ": {"WikiText-2": 100.0, "PTB": 483848.75},
            "Quadapter": {"WikiText-2": 50.0, "PTB": 90.0},
            "Quadapter + phase 2": {"WikiText-2": 27.5, "PTB": 88.0},
        },
        "bits": {"weight": {"8 bits per channel": 12}, "output": {"8 bits": 70, "16 bits": 3}},
        "pairs": [pair(n) for n in range(4)],
        "choice": {"ones": 1.5, "cle": 0.5, "learned": 0.125},
        "chosen": ({"all": "learned", "up-down": "cle"}, 0.1125),
        "finetuning": [(0, 3.5), (1, 3.25), (2, 3.0)],
        "finetuning_loss": "distillation",
        "streams": [stream("As the model is", 24469.0), stream("Rotated (hadamard)", 12.5)],
        "sites": [
            SiteFacts(f"model.layers.{n}.mlp.down_proj", 8, 0.01 * n, 0.5 * n) for n in range(20)
        ],
        "coverage": CoverageFacts({"Linear": (14, 0), "Add": (9, 2)}, [("x.add", "Add", "off")]),
        "stages": {"phase 2": "fine-tuning: 3.5 -> 3.0 </script>"},
        "seconds": {"load": 1.5, "quadapter": 61.25},
        "settings": {"bits": [8, 8], "calibration": {"steps": 5}},
        "versions": {"torch": "2.14.1"},
        "objective": "block",
        "measured_on": {"channels": "4 samples", "sites": "the first 128 tokens"},
    }
    return RunFacts(**given | changes)


def page_of(folder: Path, **changes: Any) -> str:
    file = folder / "report.html"
    write_run_page(facts(**changes), file)
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("page"))


def embedded(page: str, name: str) -> Any:
    """What the page's script reads."""
    (text,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page)
    return json.loads(text)


def words(page: str) -> str:
    """What a reader sees, and the drawings' letters."""
    shown = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", shown).split())


def test_the_verdict_compares_with_the_model_that_was_quantized(page: str) -> None:
    said = words(page)
    assert "FP32, prefix 25.00 → PTQ 100.0 → Quadapter + phase 2 27.50 WikiText-2: 93.1%" in said
    assert "is taken back (in log perplexity), +10.0% is left." in said  # 27.5 / 25


@pytest.mark.parametrize(
    ("ptq", "ours", "words_of_it"),
    [
        (25.1, 25.05, "PTQ alone loses less than 1 %"),
        (50.0, 75.0, "worse than PTQ, +200.0% above the unquantized model"),
        (float("inf"), 30.0, "a perplexity is not finite"),
    ],
)
def test_a_verdict_is_not_flattered(
    ptq: float, ours: float, words_of_it: str, tmp_path: Path
) -> None:
    rows = {"FP32": {"PTB": 25.0}, "PTQ": {"PTB": ptq}, "Quadapter": {"PTB": ours}}
    assert words_of_it in words(page_of(tmp_path, perplexity=rows))


def test_the_channels_of_every_pair_are_in_the_page(page: str) -> None:
    found = embedded(page, "pairs")
    for one, wanted in zip(found, facts().pairs, strict=True):
        assert one["name"] == wanted.name
        assert one["losses"] == wanted.losses
        assert wanted.before is not None
        assert wanted.after is not None
        for name, values in (
            ("alpha", wanted.alpha),
            ("low_before", wanted.before[0]),
            ("high_before", wanted.before[1]),
            ("low_after", wanted.after[0]),
            ("high_after", wanted.after[1]),
        ):
            np.testing.assert_allclose(unpacked(one[name]), values, rtol=2**-8)


def test_small_numbers_beside_large_ones_are_kept() -> None:
    values = np.array([24469.0, -1e-7, 0.0, 3.14159, -1e30], np.float32)
    np.testing.assert_allclose(unpacked(packed(values)), values, rtol=2**-8)
    assert len(packed(np.zeros(1536, np.float32))) == 4096  # 2 bytes each, in base64


def test_the_pair_with_the_largest_outlier_is_shown_first(tmp_path: Path) -> None:
    flat = np.ones((2, 8), np.float32)
    pairs = [pair(n, 8, before=flat, after=flat) for n in range(3)]
    pairs[1] = pair(1, 8, before=np.where(np.arange(8) == 3, 50.0, flat).astype(np.float32))
    page = page_of(tmp_path, pairs=pairs)
    (chosen,) = re.findall(r'<option value="(\d)" selected>', page)
    assert chosen == "1"


def test_every_part_says_what_was_found(page: str) -> None:
    said = words(page)
    assert "largest 2.447e+04, at token 0" in said
    assert "&lt;b&gt;" in said  # a token that looks like markup is not
    assert "model.layers.19.mlp.down_proj 8 19.00% 9.5 10.0%" in said
    assert "The worst 15 of 20" in said
    assert "23 operations, 1 without an encoding" in said
    assert "70 × 8 bits, 3 × 16 bits" in said
    assert "up-down: cle" in said
    assert "fine-tuning: 3.5 -&gt; 3.0" in said
    assert "calibration.steps 5" in said
    assert '<td class="kept">0.0312</td>' in page


def test_what_was_not_done_is_not_there(tmp_path: Path) -> None:
    nothing = {"finetuning": (), "stages": {}, "choice": None, "chosen": None, "streams": []}
    page = page_of(tmp_path, **nothing, pairs=[pair(0, before=None, after=None, curve=[(0, 0.0)])])
    said = words(page)
    for absent in ("Residual stream", "Phase 2", "Behind phase 1", "Error of the whole model"):
        assert absent not in said
    assert "low_before" not in embedded(page, "pairs")[0]


def test_it_names_no_outside_address(page: str) -> None:
    own = re.sub(r"/\* BEGIN bokeh.*?/\* END bokeh[^*]*\*/", "", page, flags=re.S)
    assert len(own) < len(page) - 1_000_000  # Bokeh's code names its own site, and calls nothing
    assert not re.search(r"https?:|//\w+\.\w|@import|url\((?!#)", own)
    assert "default-src 'none'" in own
    links = re.findall(r'(?:src|href)="([^"]*)"', own)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)


def test_the_pages_of_a_large_model_stay_small(tmp_path: Path) -> None:
    """As many channels as SmolLM2-135M has: 121 pairs, 87 000 channels."""
    sizes = [576] * 61 + [1536] * 30 + [192] * 30
    page_of(tmp_path, pairs=[pair(n, size) for n, size in enumerate(sizes)])
    assert (tmp_path / "report.html").stat().st_size < 4e6


@pytest.mark.skipif(bool(browser.missing()), reason=f"not on this machine: {browser.missing()}")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_all(width: int, tmp_path: Path) -> None:
    page_of(tmp_path)
    with browser.browser(tmp_path / "profile", width) as window:
        window.open(tmp_path / "report.html")
        window.wait("document.body.dataset.ready")
        assert window.value("return innerWidth") == width
        assert window.value("return document.documentElement.scrollWidth") <= width
        shown = "const s = Bokeh.documents[0].get_model_by_name('channels'); return s.data"
        alpha = window.value(f"{shown}.alpha")
        np.testing.assert_allclose(alpha, facts().pairs[0].alpha, rtol=2**-8)
        window.value(
            "const l = document.getElementById('pair'); l.value = '2';"
            "l.dispatchEvent(new Event('change'))"
        )
        high = window.value(f"{shown}.high_before")
        wanted = facts().pairs[2].before
        assert wanted is not None
        np.testing.assert_allclose(high, wanted[1], rtol=2**-8)
        assert "Kept: learned" in window.value("return document.getElementById('picked').innerText")
        assert window.value("return performance.getEntriesByType('resource').length") == 0
        assert window.complaints() == []
        assert window.pdf().startswith(b"%PDF")
