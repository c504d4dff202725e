"""The report of a run: what is on the page, in which state of the run, and what is drawn."""

import html.parser
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import rich.console
from tiny_run import FLAGS, make_dataset, run
from tiny_run import command as command_of

import train.report
from train.clock import PHASES
from train.config import TrainConfig
from train.history import read_history
from train.loop import train as run_training
from train.manifest import Manifest
from train.report import report_html, try_report
from train.report_terminal import report_terminal, sparkline
from train.run import RunError
from train.svg import Band, Line, chart, short

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    data = Manifest.read(make_dataset(place / "data") / "tiny")
    short_run = {"max_iters": 6, "eval_interval": 2, "eval_iters": 1, "sample_interval": 3}
    run_training(TrainConfig(**{**FLAGS, **short_run}, out_dir=str(place / "first <run>")), data)
    return place / "first <run>"


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


class Page(html.parser.HTMLParser):
    """What a browser would find: tags, what they point at, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_finished_run_has_its_report(trained):
    text = (trained / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.links == []
    assert "url(" not in text
    assert "http" not in text
    assert "all 6 steps on tiny" in page.text
    assert page.tags.count("svg") == 5
    val = [json.loads(x) for x in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"{val['val_loss']:.4f}" in page.text
    for words in (*PHASES, "after step 3", "after step 6", "n_embd", "pytest", "jax", "sha256"):
        assert words in page.text, words
    assert "first <run>" in page.text  # escaped in the file, or the page would have a tag `run`
    assert "run" not in page.tags


def test_a_run_in_progress_has_one_too(copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    (copy / "samples.jsonl").write_text('{"iter": 9, "text": "of steps undone"}\n{"iter": 1, "te')
    history = read_history(copy)
    assert history.steps_done == 2
    assert history.evaluations == history.samples == []
    page = Page(report_html([history]))
    assert "2 of 6 steps" in page.text
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="has logged no step yet"):
        read_history(copy)
    (copy / "report.html").unlink()
    assert try_report(copy) == []
    assert not (copy / "report.html").exists()


def test_a_sample_that_was_drawn_again_is_shown_once(trained):
    samples = trained / "samples.jsonl"
    before = samples.read_text()
    samples.write_text(before + before)
    try:
        assert [sample["iter"] for sample in read_history(trained).samples] == [3, 6]
    finally:
        samples.write_text(before)


def test_several_runs_are_compared(trained, copy):
    content = json.loads((copy / "run.json").read_text())
    content["config"]["learning_rate"] = 0.125
    del content["sha256"]
    (copy / "run.json").write_text(json.dumps(content))
    text = report_html([read_history(trained), read_history(copy)])
    page = Page(text)
    assert page.open == []
    differing = text[text.index("Configuration") : text.index("every setting")]
    assert re.findall(r"<td>(\w+)</td>", differing) == ["learning_rate", "out_dir"][:1]
    assert "0.125" in differing
    assert "n_embd" not in differing


def test_the_terminal_says_the_same(trained):
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    history = read_history(trained)
    console.print(report_terminal([history], 20))
    text = console.export_text()
    for words in ("all 6 steps on tiny", f"{history.evaluations[-1]['val_loss']:.4f}", *PHASES):
        assert words in text
    assert "a sample after step 6" in text


def test_sparklines_go_from_the_least_to_the_most():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0], 8) == "█▁"
    assert sparkline([3, 3, 3], 8) == "▁▁▁"
    assert len(sparkline(list(range(1000)), 30)) <= 30


def paths(drawn, kind):
    """The corners of the paths of a class, in the coordinates of the picture."""
    root = ET.fromstring(drawn)
    for element in root.iter("path"):
        if kind in element.attrib["class"].split():
            corners = re.findall(r"(-?[\d.]+),(-?[\d.]+)", element.attrib["d"])
            yield [(float(x), float(y)) for x, y in corners]


def test_a_curve_is_drawn_where_its_numbers_are():
    drawn = chart("t", "step", [Line("a", [(0, 0.0), (50, None), (100, 10.0)])])
    (line,) = paths(drawn, "line")
    assert line == [(64.0, 236.0), (706.0, 12.0)]  # the corners of the frame
    ticks = [element.text for element in ET.fromstring(drawn).iter("text")]
    assert {"0", "2", "4", "6", "8", "10", "20", "100", "step"} <= set(ticks)


def test_long_curves_are_thinned_and_keep_their_extremes():
    points = [(i, 5.0) for i in range(100_000)]
    points[77_777] = (77_777, 9.0)
    drawn = chart("t", "step", [Line("a", points, faint=True)])
    (line,), (spread,) = paths(drawn, "line"), paths(drawn, "spread")
    assert len(line) <= 300
    assert line[-1][0] == 706.0  # the last step is where it belongs
    assert min(y for _, y in spread) == 12.0
    assert min(y for _, y in line) > 200


def test_a_band_is_drawn_over_what_there_is():
    band = Band("expected", [(i, 4 - i / 50, 5 - i / 50) for i in range(0, 201, 10)])
    drawn = chart("t", "step", [Line("a", [(0, 4.5), (100, 2.5)])], band)
    (corners,) = paths(drawn, "band")
    assert len(corners) == 2 * 11
    assert max(x for x, _ in corners) == 706.0
    text = report_html([])
    assert "svg" not in Page(text).tags


@pytest.mark.parametrize("points", [[], [(0, None)], [(0, float("nan"))]])
def test_nothing_is_drawn_of_nothing(points):
    assert chart("t", "step", [Line("a", points)]) == ""


def test_one_point_is_a_dot():
    drawn = chart("t", "step", [Line("a", [(5, 3.0)])])
    assert len(list(ET.fromstring(drawn).iter("circle"))) == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (3e-4, "0.0003"), (1.23456, "1.235"), (250, "250"), (12000, "12k"),
     (3.4e6, "3.4M"), (2e13, "20T"), (-12000, "-12k")],
)  # fmt: skip
def test_numbers_are_short(number, text):
    assert short(number) == text


def test_a_report_that_fails_is_told_and_harms_nothing(copy, monkeypatch):
    def broken(*_):
        raise OSError("no space left")

    before = (copy / "report.html").read_bytes()
    monkeypatch.setattr(train.report, "write_atomically", broken)
    assert try_report(copy) == ["no report: OSError: no space left"]
    assert (copy / "report.html").read_bytes() == before


def test_the_command(trained, tmp_path):
    page = tmp_path / "page.html"
    result = run(command_of("report.py", "--out_dir", trained, "--output", page), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "all 6 steps on tiny" in result.stdout
    assert Page(page.read_text()).open == []
    result = run(command_of("report.py", "--out_dir", tmp_path / "none"), tmp_path)
    assert result.returncode == 2
    assert "run.json not found" in result.stderr
    assert "Traceback" not in result.stderr
    nowhere = tmp_path / "none" / "page.html"
    result = run(command_of("report.py", "--out_dir", trained, "--output", nowhere), tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"report: cannot write '{nowhere}': No such file or directory\n"
