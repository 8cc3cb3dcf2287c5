"""What the pages say of bits, ranges and the HTP is what the committed results say."""

from typing import Any

import pytest
from pages import ROOT, measured, recorded, section

BITS, DEPLOYMENT, EIGHT, GENERATION = (
    ROOT / "docs" / f"{name}.md" for name in ("bits", "deployment", "eight-bits", "generation")
)
AUTO = "smollm2_bits_auto.json"
CHOSEN = "quadapter, ranges chosen"

CELLS = {
    "W8A8, residual stream at A16": ("htp/smollm2_w8a8.json", "quadapter", 16),
    "W8A16": ("htp/smollm2_w8a16.json", "quadapter", 16),
    "every operation quantized": ("smollm2_all_sites.json", "quadapter", 16),
    "softmax at A16": ("smollm2_all_sites_softmax16.json", "quadapter", 16),
    "`compensate_softmax`": ("smollm2_all_sites_compensated.json", "quadapter", 16),
    "SmoothQuant, all at A8": ("smollm2_w8a8.json", "smoothquant", 8),
    "Quadapter, all at A8": (AUTO, "quadapter", 8),
    "Quadapter, all at A8, ranges chosen": (AUTO, CHOSEN, None),
    "the same, 3 sites at A16": (AUTO, f"{CHOSEN}, 3 sites at A16", None),
}
"""Row of docs/bits.md → file, method and bits of the residual stream."""


@pytest.mark.parametrize("row", CELLS)
def test_a_row_of_bits_is_what_was_measured(row: str) -> None:
    file, method, residual = CELLS[row]
    after = measured(file, f"{method} + phase 2", residual) if file == AUTO else ""
    line = f"| {row} | {measured(file, method, residual)} |"
    assert f"{line} {after}".rstrip() in BITS.read_text(encoding="utf-8")


def test_the_stream_in_eight_bits_is_what_was_measured() -> None:
    (row,) = [r for r in recorded("htp/smollm2_w8a8.json")["rows"] if r["residual_bits"] == 8]
    said = " / ".join(f"{value:,.0f}".replace(",", " ") for value in row["perplexity"].values())
    assert f"| W8A8 | {said} |" in section(BITS, "The residual stream at 16 bits")


def test_the_trials_of_ranges_and_bits_are_what_was_measured() -> None:
    found = recorded(AUTO)
    text = BITS.read_text(encoding="utf-8")
    ranges, bits = found["choices"].values()
    assert f"{ranges['loss']:.4f}" in text
    for choice in ranges["choices"]:
        low, high = (f"{end:.5g}" for end in choice["was"])
        (line,) = [x for x in text.splitlines() if f"[{low}, {high}]" in x]
        assert choice["site"] in line
        assert line.endswith(f"{choice['loss']:>10.4f}{choice['before'] - choice['loss']:>10.4f}")
    for choice in bits["choices"]:
        assert f"{choice['error']:>11.4f}{choice['loss']:>10.4f}{choice['gain']:>10.4f}" in text
    chosen, assigned = (found["seconds"][what] for what in ("choose ranges", "assign bits"))
    assert f"took {chosen:.0f} s and {assigned:.0f} s" in text
    assert f"peak memory {found['peak_memory_gib']:.1f} GiB" in text.replace("\n", " ")


def test_what_the_weights_of_norms_cost_is_what_was_measured() -> None:
    text = section(BITS, "Weights of norms")
    eight = measured("real/gemma3_w8a16.json", "ptq")
    sixteen, exact = (measured("real/gemma3_w8a16_norms.json", m) for m in ("ptq", "FP"))
    assert f"{eight} with 8 bits for them, {sixteen} with 16, {exact} unquantized" in text


EMBEDDED = ("embedded_w8a8", "embedded_w8a8_residual_a16", "embedded_w8a16")


def test_what_verify_says_of_the_embedded_model_is_what_was_measured() -> None:
    text = section(DEPLOYMENT, "Verify")
    results = [recorded(f"htp/{name}.json") for name in EMBEDDED]
    numbers = [result["verify"]["numbers"] for result in results]
    scores = [
        ", ".join(
            f"{value:.3f}"
            for value in (r["run"]["perplexity"]["Quadapter"], *n["perplexity"].values())
        )
        for r, n in zip(results, numbers, strict=True)
    ]
    assert f"| perplexity: sim, CPU, HTP | {' | '.join(scores)} |" in text
    same = [n["HTP = sim"] for n in numbers]
    shares = [
        " / ".join(f"{100 * s[key] / s['positions']:.1f} %" for key in ("same_or_tie", "same"))
        for s in same
    ]
    assert f"| same token on HTP, with ties / first only | {' | '.join(shares)} |" in text
    for one in same:
        mean = one["total"] / one["values"]
        assert f"{mean:.2f} / {one['largest']:.0f} (of" in text or f"{mean:.0f} / " in text
    operations = [n["htp"]["operations"] for n in numbers]
    line = " | ".join(f"{count} of {count}" for count in operations)
    assert f"| operations on HTP | {line} |" in text


def test_how_the_htp_reads_eight_bits_is_what_was_measured() -> None:
    found = recorded("eight_bits/smollm2_htp.json")["deployed"]["ptq_a8"]
    text = section(EIGHT, "On the HTP").replace("\n", " ")
    sim, cpu, htp = (found["perplexity"][name] for name in ("sim", "CPU", "HTP"))
    assert f"perplexity {sim:.1f} in the sim, {cpu:.1f} of the file on the CPU, {htp:.1f}" in text
    assert f"({found['perplexity without quantizers']:.1f} unquantized)" in text
    for name in ("HTP = sim", "sim in float64"):
        of = found[name]
        assert f"at {100 * of['same_or_tie'] / of['positions']:.1f} %" in text


def test_generated_text_is_what_was_measured() -> None:
    text = section(GENERATION, "Is it the sim's text?")
    for case, places in recorded("htp/generation.json")["cases"].items():
        for place in ("CPU", "HTP"):
            assert generated(f"{case}, {place}", places[place]) in text
            assert places[place]["all ties"] or case == "W8A16"


def generated(name: str, of: dict[str, Any]) -> str:
    """A row: the sim's choices and texts, the largest distance of the others, seconds."""
    counts = (
        f"{of[what]} of {of[whole]}"
        for what, whole in (("the sim's choice", "places"), ("the sim's texts", "texts"))
    )
    gaps = of["steps of the others"]
    furthest = f"{max(gaps):.1f}" if gaps else ""
    return f"| {name} | {' | '.join(counts)} | {furthest} | {of['cpu_seconds_per_token']:.2f} s |"
