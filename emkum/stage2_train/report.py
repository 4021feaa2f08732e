"""One static HTML page of an experiment: what was run, what it cost, how it learned, what it finds.

The page is one file. It loads nothing, runs nothing (its own content policy forbids both) and reads on a phone, in
the dark and on paper. Captions and names come from data: every text is escaped and stripped of control characters.
"""

from __future__ import annotations

import base64
import html
import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emkum.shards.durable import write_file

MAX_TEXT = 400  # letters of one caption or cell; a report is no place for a novel
CHART_WIDTH, CHART_HEIGHT = 460, 270
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 52, 14, 12, 42
MAX_POINTS = 400  # of one line; more cannot be seen
NUM_COLOURS = 4


@dataclass(frozen=True)
class Step:
    """One command as a user would type it, its time, and what came of it."""

    title: str
    command: str
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One line of a chart; points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table. `bars`: 0 to 1 for each cell, drawn behind the text; strong: the row to look at."""

    name: str
    cells: Sequence[str]
    bars: Sequence[float] | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """`groups`: headings above the columns, (text, how many columns)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    groups: Sequence[tuple[str, int]] = ()
    note: str = ""


@dataclass(frozen=True)
class Found:
    """One picture of an answer."""

    jpeg: bytes
    right: bool
    score: float | None = None


@dataclass(frozen=True)
class Query:
    """A caption and the pictures nearest to it, best first. rank: where the right picture stands, from 1."""

    caption: str
    found: Sequence[Found]
    rank: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything on the page, in the page's order."""

    title: str
    lead: str
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    gallery: Sequence[Query] = ()
    gallery_note: str = ""
    steps: Sequence[Step] = ()
    bill: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes the page whole or not at all; returns its path. Raises StorageFailure."""
    write_file(Path(path), render(report).encode("utf-8"))
    return Path(path)


def render(report: Report) -> str:
    """The page as text, a whole HTML document that can be encoded as UTF-8."""
    parts = [
        f"<header><h1>{_text(report.title)}</h1>",
        f'<p class="lead">{_text(report.lead)}</p></header>',
        _facts(report.facts, "facts"),
        *map(_table, report.tables),
        _charts(report.charts),
        _gallery(report.gallery, report.gallery_note),
        _steps(report.steps),
        _bill(report.bill),
        _notes(report.notes),
    ]
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def percent_row(name: str, values: Iterable[float | None], strong: bool = False, bars: bool = True) -> Row:
    """A row of percentages to one decimal, with a bar behind each; a dash for None."""
    values = list(values)
    cells = ["–" if value is None else f"{value:.1f}" for value in values]
    widths = [0.0 if value is None or not math.isfinite(value) else value / 100 for value in values]
    return Row(name, cells, widths if bars else None, strong)


# --- parts of the page ---------------------------------------------------------------------------------


def _facts(facts: Sequence[tuple[str, str]], css: str) -> str:
    if not facts:
        return ""
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    return f'<dl class="{css}">{cells}</dl>'


def _table(table: Table) -> str:
    head = ""
    if table.groups:
        spans = "".join(f'<th scope="colgroup" colspan="{count}">{_text(name)}</th>' for name, count in table.groups)
        head += f'<tr class="groups"><td></td>{spans}</tr>'
    head += "<tr><td></td>" + "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns) + "</tr>"
    body = "".join(map(_row, table.rows))
    return (
        f"<section><h2>{_text(table.title)}</h2>"
        f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
        f"{_note(table.note)}</section>"
    )


def _row(row: Row) -> str:
    bars = row.bars if row.bars is not None else [0.0] * len(row.cells)
    cells = ""
    for cell, bar in zip(row.cells, bars, strict=True):
        width = 100 * min(1.0, max(0.0, bar))
        behind = f' style="--bar:{width:.1f}%"' if width else ""
        cells += f"<td{behind}>{_text(cell)}</td>"
    return f'<tr{" class=strong" if row.strong else ""}><th scope="row">{_text(row.name)}</th>{cells}</tr>'


def _charts(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    return f'<section><h2>How it learned</h2><div class="charts">{"".join(map(_chart, charts))}</div></section>'


def _chart(chart: Chart) -> str:
    lines = [(series.name, _points(series)) for series in chart.series]
    lines = [(name, points) for name, points in lines if points]
    legend = "".join(
        f'<li><svg class="key line{number % NUM_COLOURS}" viewBox="0 0 22 8" aria-hidden="true">'
        f'<path d="M0 4H22"/></svg>{_text(name)}</li>'
        for number, (name, _) in enumerate(lines)
    )
    drawing = _drawing(chart, [points for _, points in lines]) if lines else '<p class="note">Nothing was logged.</p>'
    return (
        f'<figure><figcaption>{_text(chart.title)}</figcaption>{drawing}<ul class="legend">{legend}</ul>'
        f"{_note(chart.note)}</figure>"
    )


def _points(series: Series) -> list[tuple[float, float]]:
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    step = -(-len(points) // MAX_POINTS)
    if step > 1:  # means of neighbours, so that no single step stands for its surroundings
        groups = [points[start : start + step] for start in range(0, len(points), step)]
        points = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return points


def _drawing(chart: Chart, lines: list[list[tuple[float, float]]]) -> str:
    x_ticks = ticks(min(x for line in lines for x, _ in line), max(x for line in lines for x, _ in line), 5)
    y_ticks = ticks(min(y for line in lines for _, y in line), max(y for line in lines for _, y in line), 5)
    x_low, x_high = min(x_ticks[0], *(x for line in lines for x, _ in line)), x_ticks[-1]
    y_low, y_high = y_ticks[0], y_ticks[-1]
    left, right = MARGIN_LEFT, CHART_WIDTH - MARGIN_RIGHT
    top, bottom = MARGIN_TOP, CHART_HEIGHT - MARGIN_BOTTOM

    def across(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def down(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    marks = []
    for tick in y_ticks:
        y = down(tick)
        marks.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        marks.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x = across(tick)
        marks.append(f'<path class="tick" d="M{x:.1f} {bottom}v5"/>')
        marks.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_number(tick)}</text>')
    marks.append(f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>')
    marks.append(
        f'<text x="{(left + right) / 2:.0f}" y="{CHART_HEIGHT - 5}" text-anchor="middle">{_text(chart.x_label)}</text>'
    )
    middle = (top + bottom) / 2
    marks.append(
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{_text(chart.y_label)}</text>'
    )
    for number, line in enumerate(lines):
        path = "M" + "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in line)
        marks.append(f'<path class="line line{number % NUM_COLOURS}" d="{path}"/>')
        if len(line) <= 30:
            marks += [
                f'<circle class="dot{number % NUM_COLOURS}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.5"/>'
                for x, y in line
            ]
    name = f"{chart.title}: {chart.y_label} over {chart.x_label}"
    return (
        f'<svg class="chart" viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{_text(name)}">'
        f"{''.join(marks)}</svg>"
    )


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers, evenly spaced, from at or below `low` to at or above `high`; two or more."""
    if not high > low:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _gallery(queries: Sequence[Query], note: str) -> str:
    if not queries:
        return ""
    return f"<section><h2>What it finds</h2>{_note(note)}{''.join(map(_query, queries))}</section>"


def _query(query: Query) -> str:
    items = []
    for place, found in enumerate(query.found, start=1):
        image = base64.b64encode(found.jpeg).decode("ascii")
        name = f"{'Right' if found.right else 'Wrong'} picture in place {place}"
        mark = '<span class="mark">✓ right</span>' if found.right else ""
        score = "" if found.score is None else f'<span class="score">{found.score:.2f}</span>'
        items.append(
            f"<li{' class=right' if found.right else ''}>"
            f'<img src="data:image/jpeg;base64,{image}" alt="{name}">{mark}{score}</li>'
        )
    rank = "" if query.rank is None else f' <span class="rank">right picture in place {query.rank}</span>'
    return (
        f'<div class="query"><p class="caption"><q dir="auto">{_text(query.caption)}</q>{rank}</p>'
        f"<ol>{''.join(items)}</ol></div>"
    )


def _steps(steps: Sequence[Step]) -> str:
    if not steps:
        return ""
    items = ""
    for step in steps:
        time = "" if step.seconds is None else f' <span class="time">{duration(step.seconds)}</span>'
        items += (
            f"<li><h3>{_text(step.title)}{time}</h3><pre><code>{_text(step.command, limit=4000)}</code></pre>"
            f"{_note(step.note)}</li>"
        )
    return f'<section><h2>What was run</h2><ol class="steps">{items}</ol></section>'


def _bill(bill: Sequence[tuple[str, str]]) -> str:
    return f"<section><h2>What it cost</h2>{_facts(bill, 'bill')}</section>" if bill else ""


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f"<footer><ul>{''.join(f'<li>{_text(note, limit=4000)}</li>' for note in notes)}</ul></footer>"


def _note(note: str) -> str:
    return f'<p class="note">{_text(note, limit=4000)}</p>' if note else ""


# --- texts and numbers ---------------------------------------------------------------------------------


def _text(text: str, limit: int = MAX_TEXT) -> str:
    """Text of unknown origin, safe between tags and inside double-quoted attributes."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    # Cc: control characters; Cs: lone surrogates, which UTF-8 cannot hold; Cf: bidi overrides, which turn lines around.
    clean = "".join(
        letter if letter in "\n\t\u200c\u200d" or unicodedata.category(letter) not in ("Cc", "Cs", "Cf") else "\ufffd"
        for letter in text
    )
    return html.escape(clean, quote=True)


def _number(value: float) -> str:
    """A tick's label: short, without noise of binary fractions."""
    text = f"{value:.6g}"
    if abs(value) >= 10_000 and float(text) % 1000 == 0:
        return f"{value / 1000:.6g}k"
    return "0" if text in ("-0", "0") else text


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.1 s, 3 min 20 s, 11 h 12 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(num_bytes: float) -> str:
    """Bytes as people say them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"


STYLE = """
:root{--ink:#1c2430;--soft:#5a6675;--page:#fbfbf9;--card:#fff;--line:#dfe3e8;--bar:0%;
--bar-ink:#d6e6f8;--right:#1a7f4b;--c0:#1f6fc4;--c1:#c2571a;--c2:#1a7f4b;--c3:#7a4fb3}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa7b6;--page:#14181d;--card:#1c2229;--line:#323b46;
--bar-ink:#24425f;--right:#4cc38a;--c0:#69b1ff;--c1:#f2985a;--c2:#4cc38a;--c3:#b99aee}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem}
h3{font-size:1rem;margin:0 0 .35rem}
p{margin:.5rem 0}
.lead{font-size:1.05rem;color:var(--soft);max-width:46rem}
.note,footer{color:var(--soft);font-size:.875rem}
dl{margin:1rem 0;display:grid;gap:.75rem}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0}
.facts{grid-template-columns:repeat(auto-fit,minmax(9rem,1fr))}
.facts>div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.6rem .8rem}
.facts dd{font-size:1.2rem;font-weight:600}
.bill{gap:0;border:1px solid var(--line);border-radius:.6rem;background:var(--card)}
.bill>div{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1rem;padding:.45rem .8rem}
.bill>div+div{border-top:1px solid var(--line)}
.bill dt{font-size:.9rem}
.bill dd{font-variant-numeric:tabular-nums;font-size:.9rem}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:.6rem;background:var(--card)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.95rem}
th,td{padding:.45rem .7rem;text-align:right;font-weight:400;white-space:nowrap}
th[scope=row],thead td{text-align:left}
th[scope=row]{white-space:normal;min-width:8.5rem}
thead th{color:var(--soft);font-size:.85rem}
.groups th{text-align:center;padding-bottom:0}
tbody tr{border-top:1px solid var(--line)}
tbody td{background:linear-gradient(var(--bar-ink),var(--bar-ink)) left/var(--bar) 100% no-repeat}
.strong>*{font-weight:700}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem;max-width:40rem}
figcaption{font-weight:600;margin-bottom:.4rem}
.chart{display:block;width:100%;height:auto}
.chart text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.axis,.tick{stroke:var(--soft);stroke-width:1;fill:none}
.line,.key path{fill:none;stroke-width:2;stroke-linejoin:round}
.line0,.line0 path{stroke:var(--c0)}.line1,.line1 path{stroke:var(--c1);stroke-dasharray:6 3}
.line2,.line2 path{stroke:var(--c2);stroke-dasharray:2 3}.line3,.line3 path{stroke:var(--c3);stroke-dasharray:9 3 2 3}
.dot0{fill:var(--c0)}.dot1{fill:var(--c1)}.dot2{fill:var(--c2)}.dot3{fill:var(--c3)}
.legend{list-style:none;margin:.3rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem}
.key{width:22px;height:8px;margin-right:.4rem}
.query{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .8rem .8rem;
margin:.8rem 0;break-inside:avoid}
.caption{margin:0 0 .5rem}
.rank{color:var(--soft);font-size:.85rem;margin-left:.4rem}
.query ol{list-style:none;margin:0;padding:0;display:grid;grid-template-columns:repeat(5,minmax(0,1fr));gap:.5rem}
.query li{position:relative;border:3px solid transparent;border-radius:.5rem;padding:2px;font-size:.8rem}
.query li.right{border-color:var(--right)}
.query img{display:block;width:100%;aspect-ratio:1;object-fit:cover;border-radius:.3rem}
.mark{color:var(--right);font-weight:700;white-space:nowrap}
.score{color:var(--soft);float:right;font-variant-numeric:tabular-nums}
.steps{padding-left:1.3rem}
.steps li{margin-bottom:1rem}
.time{color:var(--soft);font-weight:400;margin-left:.3rem}
pre{margin:0;padding:.7rem .8rem;background:var(--card);border:1px solid var(--line);border-radius:.6rem;
white-space:pre-wrap;font-size:.85rem;line-height:1.45}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.8rem}
footer ul{padding-left:1.2rem;margin:0}
@media(max-width:40rem){main{padding:1rem .7rem 3rem}h1{font-size:1.4rem}table{font-size:.8rem}
th,td{padding:.35rem .3rem}thead th{font-size:.75rem}th[scope=row]{min-width:5rem}
.query ol{gap:.2rem}.query li{border-width:2px;padding:1px}.mark{font-size:.7rem}.score{display:none}}
@media print{body{background:#fff}.query,figure{break-inside:avoid}}
"""
