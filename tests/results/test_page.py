import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import aimet_quadapter
from aimet_quadapter import DataError, report
from aimet_quadapter.cli import main
from aimet_quadapter.results.plots import Series, lines, number

ROOT = Path(__file__).parents[2]
PACKAGE = Path(aimet_quadapter.__file__).parent
PAPER = json.loads((PACKAGE / "results" / "paper.json").read_text(encoding="utf-8"))["experiments"]
PAIR = "transformer.ln_f -> lm_head"
CHANNELS = {
    "alpha": [1.0, 0.01, 2.0],
    "before": {"min": [-1.0, -90.0, -1.5], "max": [1.0, 70.0, 0.5]},
    "after": {"min": [-1.0, -0.9, -3.0], "max": [1.0, 0.7, 1.0]},
    "range_before": [-90.0, 70.0],
    "range_after": [-3.0, 1.0],
}


def result(row: str = "Quadapter BC", **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "experiment": "table1/gpt2",
        "row": row,
        "model": "embedded",
        "scale": "small",
        "seed": 0,
        "perplexity": {"WikiText-2": 61.25, "PTB": 70.5},
    } | changes


def write(folder: Path, *results: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for one in results:
        file = folder / f"{len(list(folder.iterdir())):03d}.json"
        file.write_text(json.dumps(one), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a reader and a browser see of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data}".strip()

    def row(self, *begin: str) -> list[str]:
        (found,) = (row for row in self.rows if row[: len(begin)] == list(begin))
        return found

    def attributes(self, tag: str, name: str) -> list[str]:
        return [value for t, attrs in self.tags if t == tag and (value := attrs.get(name))]


def page_of(folder: Path) -> Page:
    output = folder.parent / "out" / "report.html"
    report(folder, output)
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    """A page with something in every part, and its source."""
    tuned = {"finetune_text": "PTB", "in_distribution": ["PTB"]}
    curve = [[0, 300.0], [50, 90.0], [100, 60.0]]
    stamp = {"versions": {"torch": "2.15.0"}, "git": {"commit": "abc123", "dirty": False}}
    folder = write(
        tmp_path_factory.mktemp("report") / "results",
        result("FP32", seed=None, stamp=stamp),
        result(
            "PTQ", blocks={PAIR: {"kind": "norm-head", "error": 0.5}}, settings={"weight_bits": 8}
        ),
        result(
            channels={PAIR: CHANNELS},
            blocks={PAIR: {"kind": "norm-head", "error": 0.01}},
            settings={"weight_bits": 8},
            seconds={"phase 1": 12.0},
            peak_memory_gib=1.25,
        ),
        result("QAT", **tuned, curves={"loss": curve, "perplexity": {"PTB": curve}}),
        *(
            result(
                "Quadapter",
                experiment="figure3",
                x={"name": "fine-tuning tokens", "value": value},
                **tuned,
            )
            for value in (1000, 10000)
        ),
    )
    output = folder.parent / "report.html"
    report(folder, output)
    html = output.read_text(encoding="utf-8")
    return Page(html), html


def test_paper_and_measured_stand_side_by_side(everything: tuple[Page, str]) -> None:
    page, _ = everything
    assert page.row("PTQ", "–")[2:6] == ["915.58", "61.25", "751.23", "70.50"]
    assert page.row("QAT", "PTB")[2:6] == ["331.61", "61.25", "33.94", "70.50"]


def test_rows_that_were_not_measured_are_shown(everything: tuple[Page, str]) -> None:
    page, _ = everything
    assert page.row("AdaRound", "–") == [
        *("AdaRound", "–", "507.07", "–", "478.29", "–", "685.98", "–"),
        *("319.74", "–", "309.11", "–", "–"),
    ]
    assert "Table 3, GPT-2" in page.text.split("without results of their own")[1]


def test_texts_that_the_paper_lacks_stand_before_its_own(tmp_path: Path) -> None:
    write(tmp_path / "results", result(perplexity={"built-in": 3.5, "PTB": 70.5}))
    heads = next(row for row in page_of(tmp_path / "results").rows if "LAMBADA" in row)
    texts = [head for head in heads if head in ("built-in", "PTB", "WikiText-2", "LAMBADA")]
    assert texts == ["built-in", "WikiText-2", "PTB", "LAMBADA"]


def test_another_model_than_the_papers_is_said_plainly(everything: tuple[Page, str]) -> None:
    page, _ = everything
    assert "This is not GPT-2’s own table." in page.text
    assert "measured on the model embedded at small scale" in page.text


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_the_papers_model_is_recognized(name: str, tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "r", result(model=name, scale="paper")))
    assert "own table" not in page.text
    page = page_of(write(tmp_path / "s", result(model=name)))
    assert "own table" not in page.text
    assert "Measured at small scale" in page.text


def test_every_figure_is_there(everything: tuple[Page, str]) -> None:
    page, html = everything
    titles = page.attributes("svg", "aria-label")
    assert titles == [
        *("Fine-tuned on PTB", "norm-head", PAIR, "PTB, F-ID, fine-tuned on PTB"),
        *("Fine-tuned on PTB", "F-ID (PTB), fine-tuned on PTB"),
        "F-OOD (WikiText-2), fine-tuned on PTB",
    ]
    for words in (
        *("perplexity", "block error", "channel", "α", "step", "loss", "fine-tuning tokens"),
        *("F-ID (PTB)", "F-OOD (WikiText-2)", f"{PAIR}: [-90, 70] → [-3, 1]"),
    ):
        assert words in page.text
    assert len(re.findall("<figcaption>", html)) == 8  # 2 tables, 6 figures


def test_settings_cost_and_versions_are_there(everything: tuple[Page, str]) -> None:
    page, _ = everything
    assert page.row("Quadapter BC", "12.0") == ["Quadapter BC", "12.0", "1.25"]
    assert page.row("weight_bits") == ["weight_bits", "8 (PTQ; Quadapter BC)"]
    assert page.row("versions.torch")[1].startswith("2.15.0")
    assert page.row("git.commit")[1].startswith("abc123")


def test_the_page_needs_nothing_else(everything: tuple[Page, str]) -> None:
    page, html = everything
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "video", "audio"}
    assert not re.search(r"@import|url\((?!#)|@font-face", html)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name == "src" or name.startswith("on")]
    links = page.attributes("a", "href")
    assert [link for link in links if not link.startswith("#")] == [
        "https://aclanthology.org/2022.findings-emnlp.185/"
    ]


def test_ids_are_unique_and_references_lead_somewhere(everything: tuple[Page, str]) -> None:
    page, html = everything
    ids = [value for _, attributes in page.tags if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', html)
    assert used
    assert set(used) <= set(ids)


def test_plots_scale_with_the_page(everything: tuple[Page, str]) -> None:
    page, _ = everything
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all("viewbox" in svg and "width" not in svg for svg in svgs)


def test_the_same_results_make_the_same_page(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", result("FP32"), result(channels={PAIR: CHANNELS}))
    report(folder, tmp_path / "a.html")
    report(folder, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_seeds_are_averaged(tmp_path: Path) -> None:
    values = (30.0, 33.0, 36.0)
    folder = write(
        tmp_path / "r",
        *(result(seed=i, perplexity={"WikiText-2": v, "PTB": 50.0}) for i, v in enumerate(values)),
        result(seed=3, perplexity={"PTB": 54.0}),
    )
    row = page_of(folder).row("Quadapter BC", "–")
    assert row[3] == "33.00 ± 3.00 (3 of the seeds)"
    assert row[5] == "51.00 ± 2.00"
    assert row[-1] == "4"


def test_models_and_scales_are_never_averaged(tmp_path: Path) -> None:
    others = {"model": "gpt2"}, {"scale": "paper"}
    changed = [result(perplexity={"PTB": 99.0}, **other) for other in others]
    page = page_of(write(tmp_path / "r", result(), *changed))
    values = [row[5] for row in page.rows if row[:2] == ["Quadapter BC", "–"]]
    assert values == ["70.50", "99.00", "99.00"]
    assert len([row for row in page.rows if row[0] == "Table 1, GPT-2"]) == 3


def test_seeds_with_other_settings_are_named(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "r",
        result(settings={"seed": 0, "steps": 80}),
        result(seed=1, settings={"seed": 1, "steps": 500}),
    )
    assert "differ in their settings: Quadapter BC: steps." in page_of(folder).text


def test_averages_of_several_fine_tuning_texts(tmp_path: Path) -> None:
    values = {"WikiText-2": 30.0, "PTB": 40.0, "LAMBADA": 50.0, "CBT-CN": 20.0, "CBT-NE": 22.0}
    tuned = "CBT-NE+PTB+LAMBADA+CBT-CN"  # in any order
    folder = write(
        tmp_path / "r",
        result("Quadapter", experiment="table2/gpt2", finetune_text=tuned, perplexity=values),
        result("FP32", experiment="table2/gpt2", perplexity=values),
    )
    page = page_of(folder)
    assert page.row("Quadapter", "4 texts")[-5:] == ["36.98", "33.00", "31.71", "30.00", "1"]
    assert page.row("FP32")[-5:] == ["36.88", "33.00", "29.28", "30.00", "1"]


def test_an_experiment_of_ones_own(tmp_path: Path) -> None:
    x = {"name": "learning rate", "value": 1e-4}
    folder = write(
        tmp_path / "r",
        result("<i>mine</i> & $x_1$", experiment="sweep", x=x),
        result("<i>mine</i> & $x_1$", experiment="sweep", x=x | {"value": 0.1}),
    )
    page = page_of(folder)
    assert page.row("<i>mine</i> & $x_1$", "–", "0.0001")[3:] == ["61.25", "70.50", "1"]
    assert "i" not in {tag for tag, _ in page.tags}
    assert "own table" not in page.text


def test_an_experiment_of_ones_own_has_the_heading_its_results_give(tmp_path: Path) -> None:
    own = result(experiment="rates", title="QAT against its rate & more")
    older = result(experiment="rates", model="another")  # from before results had a title
    page = page_of(write(tmp_path / "r", own, older, result(title="not the paper's")))
    assert "QAT against its rate & more Model embedded" in page.text
    assert "QAT against its rate & more Model another" in page.text
    assert "not the paper's" not in page.text  # Table 1 keeps the paper's heading


def test_results_without_any_optional_part(tmp_path: Path) -> None:
    bare = {"schema": 1, "experiment": "figure6", "row": "x", "model": "m", "scale": "small"}
    loss = {PAIR: [[0, 1.0], [1, 0.0]], "other": []}
    folder = write(tmp_path / "r", bare, bare | {"row": "y", "curves": {"loss": loss}})
    assert page_of(folder).attributes("svg", "aria-label") == ["y"]


def test_many_curves_are_spread_over_plots(tmp_path: Path) -> None:
    loss = {f"block {i}": [[0, 1.0], [1, 0.5]] for i in range(9)}
    page = page_of(write(tmp_path / "r", result(curves={"loss": loss})))
    ends = "Quadapter BC, the first and the last pair"  # what the paper's Figure 6 has
    assert page.attributes("svg", "aria-label") == [ends, "Quadapter BC", "Quadapter BC"]


def test_a_long_legend_leaves_the_plot_its_height() -> None:
    def height(names: int) -> float:
        svg = lines("t", [Series(f"row {n}", n, [0, 1], [1, 2]) for n in range(names)], "x", "y")
        found = re.search(r'viewBox="0 0 \S+ (\S+)"', svg)
        assert found
        return float(found[1])

    assert height(2) < height(8) < height(16)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", result(surprise=1))
    (folder / "sub").mkdir()
    (folder / "sub" / "manifest.json").write_text('{"a": 1}', encoding="utf-8")
    (folder / "half.json").write_text('{"schema": 1,', encoding="utf-8")
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00\xd8")
    text = page_of(folder).text
    for words in (
        "sub/manifest.json is left out: not a result",
        "half.json is left out: not JSON",
        "binary.json is left out: not UTF-8",
        "fields that are not shown: surprise",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "000.json is of schema 2"),
        ({"perplexity": {"PTB": "low"}}, "000.json: perplexity.PTB: 'low' is not"),
        ({"perplexity": {"PTB": -1.0}}, "perplexity.PTB"),
        ({"perplexity": {"PTB": float("nan")}}, "NaN is no measured number"),
        ({"model": None}, "000.json: model"),
        ({"scale": "large"}, "scale: 'large'"),
        ({"x": {"name": "tokens"}}, "'value' is a required property"),
        ({"channels": {PAIR: CHANNELS | {"alpha": [1.0]}}}, "have lengths"),
    ],
)
def test_a_wrong_result_is_an_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        report(write(tmp_path / "r", result(**changes)), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_wrong_folders_are_errors(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with pytest.raises(DataError, match="is not a folder"):
        report(folder, tmp_path / "report.html")
    write(folder)
    with pytest.raises(DataError, match="holds no result file"):
        report(folder, tmp_path / "report.html")
    write(folder, {"a": 1})
    with pytest.raises(DataError, match=r"000\.json is left out: not a result"):
        report(folder, tmp_path / "report.html")
    write(folder, result())
    with pytest.raises(DataError, match="Name the page itself"):
        report(folder, tmp_path)
    write(folder, result())
    with pytest.raises(DataError, match=r"001\.json and 002\.json are of the same"):
        report(folder, tmp_path / "report.html")


def test_the_command_line_needs_no_torch(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", result())
    code = (
        "import sys; from aimet_quadapter.cli import main\n"
        "assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "report", str(folder), "-o", str(tmp_path / "a.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "a.html" in done.stdout
    assert "915.58" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("quadapter: error: ")
    assert "nowhere is not a folder" in line


def test_the_papers_numbers_agree_with_each_other() -> None:
    def rows(name: str) -> dict[tuple[str, str | None], dict[str, Any]]:
        return {(row["row"], row["finetune_text"]): row for row in PAPER[name]["rows"]}

    for row in PAPER["table2/gpt2"]["rows"]:
        values = dict(row["perplexity"])
        out = values.pop("WikiText-2")
        assert row["average"] == {
            "F-ID": pytest.approx(sum(values.values()) / 4, abs=0.006),
            "F-OOD": out,
        }
    with_ranges = rows("table1/gpt2")
    for key, row in rows("table3/gpt2").items():
        for text, gain in row["gain_of_range_learning"].items():
            ours = row["perplexity"][text] - with_ranges[key]["perplexity"][text]
            assert gain == pytest.approx(ours, abs=0.011)


def test_the_papers_tables_are_whole() -> None:
    sizes = {"table1/gpt2": 11, "table1/distilgpt2": 11, "table2/gpt2": 4, "table3/gpt2": 6}
    for name, entry in PAPER.items():
        assert len(entry["rows"]) == sizes.get(name, 0)
        assert entry["rows"] or "gives no numbers" in entry["note"]
        for row in entry["rows"]:
            assert list(row["perplexity"]) == ["WikiText-2", "PTB", "LAMBADA", "CBT-CN", "CBT-NE"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(29.274, "29.27"), (915.58, "915.6"), (12345.6, "12346"), (3.2e8, "3.2e+08")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
