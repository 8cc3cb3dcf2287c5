"""What the pages say of bits, ranges and the HTP is what the committed results say."""

import re
from typing import Any

import pytest
from pages import ROOT, measured, perplexities, recorded, rows, section

from aimet_quadapter.precision.bits import BitAssignment, BitChoice
from aimet_quadapter.precision.clipping import RangeChoice, RangeChoices


def flat(page: str, heading: str) -> str:
    """What stands under a heading of a page, on one line."""
    return " ".join(section(ROOT / "docs" / page, heading).split())


def test_the_residual_stream_at_16_bits_is_what_was_measured() -> None:
    text = section(ROOT / "docs" / "bits.md", "The residual stream at 16 bits")
    found = re.findall(r"^\| (.*) \| (\d.*) \|$", text, re.M)
    assert [name for name, _ in found] == list(STREAM)
    for name, cell in found:
        exact = perplexities(*STREAM[name])
        wanted = (f"{x:,.0f}".replace(",", " ") if x > 1e3 else f"{x:.2f}" for x in exact)
        assert cell == " / ".join(wanted)


STREAM: dict[str, tuple[str, str, int | None]] = {
    "FP32": ("htp/smollm2_w8a8.json", "FP", None),
    "W8A8": ("htp/smollm2_w8a8.json", "quadapter", 8),
    "W8A8, residual stream at A16": ("htp/smollm2_w8a8.json", "quadapter", 16),
    "W8A16": ("htp/smollm2_w8a16.json", "quadapter", 16),
}
"""Line of the table → result, row and bits of the residual stream."""


def test_what_making_up_for_the_softmax_buys_is_what_was_measured() -> None:
    text = section(ROOT / "docs" / "bits.md", "`compensate_softmax`")
    files = ("w8a8", "all_sites", "all_sites_softmax16", "all_sites_compensated")
    wanted = [measured(f"smollm2_{file}.json", "quadapter", 16) for file in files]
    assert [cell for _, cell in rows(text)] == wanted
    (table,) = recorded("smollm2_all_sites_compensated.json")["softmax"].values()
    lost, _, left = zip(*(re.findall(r"([\d.]+)%", line) for line in table[1:]), strict=True)
    lost, left = ([float(x) for x in of] for of in (lost, left))
    said = f"was {min(lost):.0f} to {max(lost):.0f} % of its norm; {min(left):.0f} to"
    assert f"{said} {max(left):.0f} % of that, squared, is left" in " ".join(text.split())


def test_bits_and_ranges_that_were_chosen_are_what_was_measured() -> None:
    text = section(ROOT / "docs" / "bits.md", "Measured")
    file = "smollm2_bits_auto.json"
    methods = ["quadapter", "quadapter, ranges chosen", "quadapter, ranges chosen, 3 sites at A16"]
    (_, fp, _), (_, smoothquant, _), *found = rows(text)
    assert fp == measured(file, "FP")
    assert smoothquant == measured("smollm2_w8a8.json", "smoothquant", 8)
    for method, (_, *cells) in zip(methods, found, strict=True):
        assert cells == [measured(file, method), measured(file, f"{method} + phase 2")]
    ranges, bits = recorded(file)["choices"].values()
    assert str(range_choices(ranges)) in text
    chosen = [BitChoice(**choice) for choice in bits.pop("choices")]
    printed = str(BitAssignment(choices=tuple(chosen), **bits)).splitlines()
    assert "\n".join(printed[: 2 + len(chosen) + 1]) in text
    assert printed[-1] in text
    first = ranges["choices"][0]
    cost = min(first["tried"].values()) - first["before"]
    assert f"at layer 11 cost {cost:.1f} nats" in " ".join(text.split())
    seconds = recorded(file)["seconds"]
    took = f"took {seconds['choose ranges']:.0f} s and {seconds['assign bits']:.0f} s"
    assert f"{took}, phase 2 about" in text
    assert seconds["phase 2"] / 3 == pytest.approx(240, abs=5)
    assert f"peak memory {recorded(file)['peak_memory_gib']:.1f} GiB" in text


def range_choices(result: dict[str, Any]) -> RangeChoices:
    """What `choose_ranges` gave, from its result file."""
    pairs = ("was", "range")
    choices = [
        RangeChoice(**{key: tuple(x) if key in pairs else x for key, x in choice.items()})
        for choice in result["choices"]
    ]
    return RangeChoices(tuple(choices), result["loss"], result["of"])


def test_weights_of_norms_are_what_was_measured() -> None:
    text = flat("bits.md", "Weights of norms")
    eight_bits, wide = (f"real/gemma3_w8a16{norms}.json" for norms in ("", "_norms"))
    said = (measured(eight_bits, "ptq"), measured(wide, "ptq"), measured(wide, "FP"))
    assert "{} with 8 bits for them, {} with 16, {} unquantized".format(*said) in text


CHOICES = {
    "What each step buys": "smollm2_w8a8_rate",
    "Qwen2.5 and Gemma 3": "qwen2_w8a8_quadapter",
}
"""Heading of docs/eight-bits.md → result of the α that its text says how they were chosen."""


@pytest.mark.parametrize("heading", CHOICES)
def test_how_alpha_was_chosen_is_what_was_measured(heading: str) -> None:
    text = flat("eight-bits.md", heading)
    result = recorded(f"eight_bits/{CHOICES[heading]}.json")
    choice = result["choice of α"]
    losses = {name: f"{loss:.3f}" for name, loss in choice["losses"].items()}
    said = "{ones} with α of ones, {cle} CLE, {smoothquant} SmoothQuant, {learned} learned"
    assert f"{said}, {{halfway}} halfway".format(**losses) in text
    assert f"and {choice['loss']:.3f} with what was chosen" in text
    seconds = (result["seconds"]["phase 1"], choice["seconds"])
    took, choosing = (f"{s:,.0f} s".replace(",", " ") for s in seconds)
    assert f"Phase 1 took {took}, {choosing} of it the choice" in text


def test_what_phase_1_and_2_cost_is_what_was_measured() -> None:
    tuned = recorded("eight_bits/smollm2_w8a8_phase2.json")
    seconds, memory = tuned["seconds"]["phase 2"], tuned["peak_memory_gib"]["phase 2"]
    text = flat("eight-bits.md", "What each step buys")
    assert f"{seconds:,.0f} s, {memory:.1f} GiB at most".replace(",", " ", 1) in text
    qwen2 = recorded("eight_bits/qwen2_w8a8_quadapter.json")["peak_memory_gib"]["phase 1"]
    assert f"in {qwen2:.1f} GiB" in flat("eight-bits.md", "Qwen2.5 and Gemma 3")
    first = recorded("smollm2_w8a8.json")
    said = f"{first['seconds']['phase 1']:.0f} s on 2 CPU cores, peak memory"
    assert f"{said} {first['peak_memory_gib']:.1f} GiB" in flat("results.md", "Perplexity")


def test_the_memory_of_gemma_is_what_was_measured() -> None:
    peaks = recorded("eight_bits/gemma3_w8a8_stream16.json")["peak_memory_gib"]
    names = {"pairs": "find pairs", "perplexity": "evaluate"}
    stages = ("load", "prepare", "sim", "pairs", "ranges", "phase 1", "perplexity")
    said = ", ".join(f"{stage} {peaks[names.get(stage, stage)]:.1f}" for stage in stages)
    assert said in flat("results.md", "Three real models")


def test_what_prose_says_of_bounds_and_rotations_is_what_was_measured() -> None:
    divergence = recorded("eight_bits/smollm2_w8a8_ablation.json")["divergence"]
    less = 1 - divergence["across the nonlinearity"] / divergence["layer"]
    layers = flat("eight-bits.md", "Layers instead of blocks")
    assert f"{100 * less:.0f} % less divergence than layers" in layers
    bounds = recorded("eight_bits/smollm2_w8a8_bounds.json")["bounds"]
    name = "the stream: sums and norms before them, a range for each channel"
    bound = f"{100 * (1 - bounds[name] / bounds['nothing']):.0f} % of the divergence"
    assert f"its bound is {bound}" in flat("method.md", "What better scales could still buy")
    ones = [
        recorded(f"four_bits/qwen2_w4a16{own}.json")["choice of α"]["losses"]["ones"]
        for own in ("_rotated_norms16", "")
    ]
    said = "held-back window: {:.2f}, as it is {:.2f};".format(*ones)
    assert said in flat("eight-bits.md", "Whether to rotate")
    alone = recorded("tiers/default.json")["perplexity"]
    both = (alone[stage]["built-in"] for stage in ("Quadapter", "FP32"))
    said = "by Quadapter alone it has {:.2f} ({:.2f} unquantized;".format(*both)
    assert said in flat("eight-bits.md", "Qwen2.5 and Gemma 3")


def test_the_transcripts_of_deployment_are_what_was_measured() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    text = " ".join(page.split())
    small = recorded("htp/embedded_w8a8.json")
    for stage, value in small["run"]["perplexity"].items():
        assert f"{stage} {value:.3f}" in text
    size = small["verify"]["numbers"]["bytes"]["model_ctx_qnn.bin"] / 1e6
    made = small["verify"]["compiled"]
    operations = f"{made['operations']} of {made['operations']} operations on HTP v73"
    assert f"{operations}, compiled in {made['seconds']:.1f} s, {size:.1f} MB" in text
    for check in small["verify"]["checks"]:
        assert f"ok {check['name']} {check['detail']}" in text
    large = recorded("htp/smollm2_w8a8.json")["deployed"]["quadapter_a16"]["checks"]
    names = ("operations on HTP", "same token on HTP", "perplexity", "the sim in float64")
    lines = [line for line in large if any(line[9:].startswith(name) for name in names)]
    assert len(lines) == len(names)
    assert "\n".join(lines) in page


DEPLOYED = {"W8A8": "w8a8", "residual stream A16": "w8a8_residual_a16", "W8A16": "w8a16"}
"""Column of the page's table → result of the embedded GPT-2."""


@pytest.mark.parametrize("name", DEPLOYED)
def test_how_near_the_embedded_model_is_on_the_htp_is_what_was_measured(name: str) -> None:
    cells = column("deployment.md", "Verify", 0, name)
    result = recorded(f"htp/embedded_{DEPLOYED[name]}.json")
    numbers, same = result["verify"]["numbers"], result["verify"]["numbers"]["HTP = sim"]
    three = (result["run"]["perplexity"]["Quadapter"], *numbers["perplexity"].values())
    assert cells[0] == ", ".join(f"{value:.3f}" for value in three)
    tied, first = (shares(same, key) for key in ("same_or_tie", "same"))
    assert cells[1] == f"{tied} / {first}"
    mean, largest = same["total"] / same["values"], same["largest"]
    digits = 0 if name == "W8A16" else 2
    assert cells[2].startswith(f"{mean:.{digits}f} / {largest:.0f} (of ")
    operations = numbers["htp"]["operations"]
    assert cells[3] == f"{operations} of {operations}"
    assert cells[4] == f"{numbers['bytes']['model_ctx_qnn.bin'] / 1e6:.1f} MB"


@pytest.mark.parametrize("name", ["W8A8, residual stream A16", "W8A16"])
def test_how_near_smollm2_is_on_the_htp_is_what_was_measured(name: str) -> None:
    cells = column("deployment.md", "Verify", 1, name)
    own = "smollm2_w8a16" if name == "W8A16" else "smollm2_w8a8"
    numbers = recorded(f"htp/{own}.json")["deployed"]["quadapter_a16"]
    four = (numbers["perplexity without quantizers"], *numbers["perplexity"].values())
    assert cells[0] == ", ".join(f"{value:.2f}" for value in four)
    compared = [numbers[of] for of in ("QDQ on CPU = sim", "HTP = sim", "sim in float64")]
    means = [of["total"] / of["values"] for of in compared]
    digits = 0 if name == "W8A16" else 2
    assert cells[1] == ", ".join(f"{mean:.{digits}f}" for mean in means)
    assert cells[2] == ", ".join(shares(of, "same_or_tie") for of in compared[1:])
    size = numbers["bytes"]["model_ctx_qnn.bin"] / 1e6
    seconds, _, megabytes = cells[3].partition(", ")
    assert float(seconds.removesuffix(" s")) == pytest.approx(numbers["htp"]["seconds"], abs=0.51)
    assert megabytes == f"{size:.0f} MB"
    farther = f"{100 * (means[1] / means[2] - 1):.0f} %"
    assert farther in flat("deployment.md", "Verify").split("and the HTP is")[1][:20]


def column(page: str, heading: str, table: int, name: str) -> list[str]:
    """Cells below the head of a column, of the `table`-th table under a heading."""
    tables = re.findall(r"(?:^\|.*\|\n)+", section(ROOT / "docs" / page, heading), re.M)
    lines = tables[table].replace("**", "").splitlines()
    head, _, *below = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [line[head.index(name)] for line in below]


def shares(same: dict[str, Any], key: str) -> str:
    """Positions with the same token, in per cent."""
    return f"{100 * same[key] / same['positions']:.1f} %"


def test_how_near_the_htp_is_behind_a_space_is_what_was_measured() -> None:
    numbers = recorded("eight_bits/smollm2_htp.json")["deployed"]["ptq_a8"]
    sim, cpu, htp = numbers["perplexity"].values()
    operations = f"{numbers['htp']['operations']:,}".replace(",", " ")
    wanted = [
        f"{operations} of {operations} operations",
        f"compiled in {numbers['htp']['seconds']:.0f} s",
        f"perplexity {sim:.1f} in the sim, {cpu:.1f} of the file on the CPU, {htp:.1f} on the HTP",
        f"({numbers['perplexity without quantizers']:.1f} unquantized)",
        f"most likely token at {shares(numbers['HTP = sim'], 'same_or_tie')}",
        f"float32 at {shares(numbers['sim in float64'], 'same_or_tie')}",
    ]
    wide = recorded("htp/smollm2_w8a8.json")["deployed"]["quadapter_a16"]
    both = [shares(wide[name], "same_or_tie") for name in ("HTP = sim", "sim in float64")]
    wanted.append("the same figures were {} and {}".format(*both))
    assert [x for x in wanted if x not in flat("eight-bits.md", "On the HTP")] == []


def test_generated_text_is_what_was_measured() -> None:
    text = section(ROOT / "docs" / "generation.md", "Is it the sim's text?")
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
