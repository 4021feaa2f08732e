"""The report page: one file, safe whatever the captions say, and drawn right."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.stage2_train.report import (
    Chart,
    Found,
    Query,
    Report,
    Row,
    Series,
    Step,
    Table,
    duration,
    percent_row,
    render,
    size,
    ticks,
    write_report,
)

VOID = {"meta", "img", "path", "circle", "link", "br"}
HOSTILE = "\"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>&amp;\x00\x1b[31m\u202e\ud800'--"


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, css: str | None = None) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and (css is None or attrs.get("class") == css)]


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def whole_report(text: str = "text") -> Report:
    found = [Found(jpeg((40 * place, 0, 0)), place == 2, 0.9 - place / 10) for place in range(5)]
    return Report(
        title=text,
        lead=text,
        facts=[(text, text)],
        tables=[
            Table(text, [text, "b"], [percent_row(text, [12.34, None], strong=True)], [(text, 2)], text),
        ],
        charts=[Chart(text, text, text, [Series(text, [1, 2, 3], [3.0, 2.0, 1.0])], text)],
        gallery=[Query(text, found, 3)],
        gallery_note=text,
        steps=[Step(text, text, 75.0, text)],
        bill=[(text, text)],
        notes=[text],
    )


def test_the_page_loads_and_runs_nothing() -> None:
    page = Page(render(whole_report()))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert "href" not in attrs
        assert attrs.get("src", "data:").startswith("data:image/jpeg;base64,") or "src" not in attrs
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.search(r"url\(|@import|https?:", render(whole_report()))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    written = write_report(whole_report(HOSTILE), tmp_path / "deep" / "report.html")
    page = written.read_text(encoding="utf-8")
    parsed = Page(page)
    # The same tags as with harmless text: nothing of it became markup.
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in Page(render(whole_report())).tags]
    assert "<script>alert(1)</script>" in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_a_novel_as_caption_is_cut() -> None:
    page = Page(render(Report("t", "l", gallery=[Query("word " * 10_000, [])])))
    assert len(page.text) < 10_000
    assert "…" in page.text


def test_the_gallery_marks_the_right_picture_in_words_and_by_class() -> None:
    page = Page(render(whole_report()))
    assert len(page.all("img")) == 5
    assert [a["alt"] for a in page.all("img")][1:4] == [
        "Wrong picture in place 2",
        "Right picture in place 3",
        "Wrong picture in place 4",
    ]
    assert len(page.all("li", "right")) == 1
    assert "✓ right" in page.text
    assert "right picture in place 3" in page.text
    data = page.all("img")[0]["src"]
    assert data is not None
    assert base64.b64decode(data.split(",")[1]) == jpeg((0, 0, 0))


def test_bars_and_cells_follow_the_numbers() -> None:
    row = percent_row("student", [12.34, None, float("nan"), 250.0], strong=True)
    assert row == Row("student", ["12.3", "–", "nan", "250.0"], [0.1234, 0.0, 0.0, 2.5], True)
    page = render(Report("t", "l", tables=[Table("T", ["a", "b", "c", "d"], [row])]))
    assert re.findall(r"--bar:([\d.]+)%\"", page) == ["12.3", "100.0"]


def test_a_line_is_drawn_where_its_numbers_are() -> None:
    chart = Chart("loss", "step", "loss", [Series("a", [0, 10], [0.0, 4.0]), Series("b", [0, 10], [4.0, 4.0])])
    page = Page(render(Report("t", "l", charts=[chart])))
    lines = [a["d"] for a in page.all("path") if (a.get("class") or "").startswith("line ")]
    # x from 52 to 446, y from 228 (0) up to 12 (4)
    assert lines == ["M52.0 228.0L446.0 12.0", "M52.0 12.0L446.0 12.0"]
    assert page.all("svg", "chart")[0]["aria-label"] == "loss: loss over step"


@pytest.mark.parametrize(
    "series",
    [
        [],
        [Series("empty", [], [])],
        [Series("not finite", [1, 2, 3], [float("nan"), float("inf"), float("-inf")])],
    ],
)
def test_a_chart_of_nothing_says_so(series: list[Series]) -> None:
    page = Page(render(Report("t", "l", charts=[Chart("loss", "step", "loss", series)])))
    assert "Nothing was logged." in page.text


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [float("nan"), 2.0], [1e-9, 2e-9], [-3.0, 1e12], [0.3, 0.7]])
def test_odd_charts_are_drawn(values: list[float]) -> None:
    page = render(Report("t", "l", charts=[Chart("c", "x", "y", [Series("s", range(len(values)), values)])]))
    assert Page(page).all("svg", "chart")
    assert not re.search(r'd="[^"]*(nan|inf)', page)


def test_a_long_line_is_thinned_to_means() -> None:
    noise = np.random.default_rng(0).normal(size=10_000)
    page = Page(render(Report("t", "l", charts=[Chart("c", "x", "y", [Series("s", range(10_000), noise.tolist())])])))
    (line,) = [a["d"] for a in page.all("path") if (a.get("class") or "").startswith("line ")]
    assert line is not None
    assert 300 < line.count("L") < 400


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.37), (1, 12_345), (-2, 3), (7, 7), (0, 0), (1e-8, 3e-8)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 9
    steps = np.diff(found)
    assert steps == pytest.approx(steps[0])
    assert float(f"{steps[0]:.0e}") == pytest.approx(steps[0])


def test_an_empty_report_is_a_page() -> None:
    assert "nothing ran" in Page(render(Report("t", "nothing ran"))).text


def test_times_and_sizes_read_well() -> None:
    assert [duration(s) for s in (0.04, 8.14, 59.96, 75, 3599.6, 40_320)] == [
        "0.0 s",
        "8.1 s",
        "1 min 0 s",
        "1 min 15 s",
        "1 h 0 min",
        "11 h 12 min",
    ]
    assert [size(b) for b in (0, 999, 1000, 15_500_000, 183e6, 2.5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "15.5 MB",
        "183 MB",
        "2500 GB",
    ]
