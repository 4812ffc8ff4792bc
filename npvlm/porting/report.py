"""A comparison in words: a table for the terminal, and a page for the browser."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from npvlm.files.output import new_file
from npvlm.porting.compare import LIMIT, Report, Row
from npvlm.porting.stages import TEXT, TOWER

FEW = 3  # missing stages in a row that have a line each; more share one
MOST_UNREAD = 8  # names that have a line each

COLOURS = {
    "OK": "#2e9e6b",
    "inherited": "#d9a520",
    "DIFF": "#cf3f3f",
    "SHAPE": "#8e44ad",
    "NAN": "#222222",
    "MISSING": "#d5d9de",
}


def table(report: Report) -> str:
    """A line for each stage, then the verdict."""
    wide = max(len(row.stage) for row in report.rows)
    local = any(row.local_over is not None for row in report.rows)
    head = f"{'':11}{'stage':<{wide}}  {'error':>9}  {'x floor':>9}"
    lines = [head + (f"  {'own':>9}" if local else "") + "  read as"]
    for missing, run in groupby(report.rows, lambda row: row.status == "MISSING"):
        rows = list(run)
        if missing and len(rows) > FEW:
            first, last = rows[0].stage, rows[-1].stage
            lines.append(f"{'MISSING':<11}{len(rows)} stages, {first} to {last}")
            continue
        for row in rows:
            own = f"  {_number(row.local_over):>9}" if local else ""
            line = (
                f"{status_of(row):<11}{row.stage:<{wide}}  {_number(row.error):>9}  "
                f"{_number(row.over):>9}{own}  {_read_as(row)}"
            )
            lines.append(line.rstrip())
    if local:
        lines.append("\nown: x floor of what the stage itself adds, on the dump's own input to it")
    return "\n".join([*lines, *_unread(report), "", report.verdict.sentence])


def _unread(report: Report) -> Iterator[str]:
    """The arrays of a dump that were not compared, because no stage has their name."""
    for name, meant in list(report.unread.items())[:MOST_UNREAD]:
        yield f"not read   {name}" + (f" (is that {meant}?)" if meant else "")
    more = len(report.unread) - MOST_UNREAD
    if more > 0:
        yield f"not read   {more} more, whose names are no stage's either"


def _read_as(row: Row) -> str:
    """The port's own name where it is another, and the layout."""
    return ", ".join(filter(None, (row.name if row.name != row.stage else "", row.layout)))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def page(report: Report, path: Path) -> None:
    """Write one page that needs nothing else: the verdict, the strip of stages, errors, a table."""
    with new_file(path) as draft:
        draft.write_text(_page(report), encoding="utf-8")


def status_of(row: Row) -> str:
    """The status as it is coloured: a difference that came in with the input is another."""
    inherited = row.local_over is not None and row.local_over <= LIMIT
    return "inherited" if row.status == "DIFF" and inherited else row.status


def _page(report: Report) -> str:
    verdict = report.verdict
    colour = COLOURS["OK" if verdict.same else "DIFF"]
    title = "The same" if verdict.same else f"Differs: {verdict.stage}"
    counts = dict.fromkeys(COLOURS, 0)
    for row in report.rows:
        counts[status_of(row)] += 1
    legend = "".join(
        f'<span><i style="background:{COLOURS[name]}"></i>{name} {count}</span>'
        for name, count in counts.items()
        if count
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d2530; background: #fff;
   max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
 h1 {{ font-size: 1.25rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }}
 .verdict {{ border-left: 6px solid {colour}; background: #f6f7f9; padding: .9rem 1.1rem; }}
 .verdict p {{ margin: 0; overflow-wrap: anywhere; }}
 .facts, .legend {{ color: #5b6673; font-size: .85rem; margin: .8rem 0; overflow-wrap: anywhere; }}
 .legend span {{ margin-right: 1.1rem; white-space: nowrap; }}
 .legend i {{ display: inline-block; width: .8em; height: .8em; margin-right: .35em; }}
 .strip {{ display: flex; flex-wrap: wrap; gap: 2px; margin: .6rem 0 1.4rem; }}
 .strip a {{ width: 11px; height: 22px; display: block; }}
 .strip a.first {{ outline: 2px solid #1d2530; outline-offset: 1px; }}
 h2 {{ font-size: 1rem; margin: 1.6rem 0 .3rem; }}
 svg {{ width: 100%; height: auto; }}
 table {{ border-collapse: collapse; width: 100%; font-size: .82rem; }}
 th, td {{ text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #e6e9ed;
   vertical-align: top; overflow-wrap: anywhere; }}
 td.n, th.n {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
 th {{ white-space: nowrap; }} td:nth-child(2) {{ min-width: 12em; }}
 td b {{ color: #fff; padding: 0 .4em; border-radius: 3px; font-weight: 600; white-space: nowrap;
   overflow-wrap: normal; }}
 .wide {{ overflow-x: auto; }} .wide svg {{ min-width: 640px; }}
</style>
<h1>{html.escape(title)}</h1>
<div class="verdict"><p>{html.escape(verdict.sentence)}</p></div>
<p class="facts">{html.escape(report.mine)} held against {html.escape(report.reference)}
 ({html.escape(report.run)}), as {report.precision}; more than {LIMIT:g} times the noise floor
 differs.</p>
{_left_out(report)}<div class="legend">{legend}</div>
<div class="strip">{_strip(report)}</div>
<h2>Error over noise floor, stage by stage</h2>
<div class="wide">{_chart(report)}</div>
<h2>Stages</h2>
<div class="wide">{_rows(report)}</div>
</html>
"""


def _left_out(report: Report) -> str:
    """A paragraph on the arrays that were not compared, if there are any."""
    lines = "<br>".join(html.escape(line) for line in _unread(report))
    return f'<p class="facts">{lines}</p>\n' if lines else ""


def _strip(report: Report) -> str:
    """A box for each stage, in order."""
    boxes = []
    for number, row in enumerate(report.rows):
        first = ' class="first"' if row.stage == report.verdict.stage else ""
        over = f", {row.over:.3g} x floor" if row.over is not None else ""
        told = html.escape(f"{row.stage}: {status_of(row)}{over}")
        colour = COLOURS[status_of(row)]
        boxes.append(
            f'<a href="#s{number}" title="{told}" aria-label="{told}"{first} '
            f'style="background:{colour}"></a>'
        )
    return "".join(boxes)


def _chart(report: Report) -> str:
    """Error over floor on a logarithmic axis, the limit as a line."""
    points = [
        (number, max(row.over, 1e-2), status_of(row))
        for number, row in enumerate(report.rows)
        if row.over is not None and math.isfinite(row.over)
    ]
    if not points:
        return "<p>No stage has a floor.</p>"
    wide, high, left, top = 1000, 260, 62, 12
    low = -2
    most = max(2, math.ceil(math.log10(max(over for _, over, _ in points))))
    count = max(len(report.rows) - 1, 1)

    def across(number: int) -> float:
        return left + number / count * (wide - left - 12)

    def up(over: float) -> float:
        return top + (most - math.log10(over)) / (most - low) * (high - top - 24)

    step = max(1, (most - low) // 8)
    grid = "".join(
        f'<line x1="{left}" x2="{wide}" y1="{up(10.0**power):.1f}" y2="{up(10.0**power):.1f}" '
        f'stroke="#e6e9ed"/><text x="{left - 8}" y="{up(10.0**power) + 4:.1f}" '
        f'text-anchor="end">{10.0**power:g}</text>'
        for power in range(low, most + 1, step)
    )
    limit = up(LIMIT)
    marks = "".join(
        f'<line x1="{across(number):.1f}" x2="{across(number):.1f}" y1="{top}" y2="{high - 24}" '
        f'stroke="#c9d0d8"/><text x="{across(number) + 4:.1f}" y="{high - 6}">{name}</text>'
        for number, name in _parts(report)
    )
    first = next(
        (
            f'<circle cx="{across(number):.1f}" cy="{up(max(row.over, 1e-2)):.1f}" r="7" '
            'fill="none" stroke="#1d2530" stroke-width="2"/>'
            for number, row in enumerate(report.rows)
            if row.stage == report.verdict.stage and row.over and math.isfinite(row.over)
        ),
        "",
    )
    dots = "".join(
        f'<circle cx="{across(number):.1f}" cy="{up(over):.1f}" r="3" fill="{COLOURS[status]}">'
        f"<title>{html.escape(report.rows[number].stage)}: {over:.3g}</title></circle>"
        for number, over, status in points
    )
    return (
        f'<svg viewBox="0 0 {wide} {high}" font-size="12" fill="#5b6673" role="img">{grid}'
        f'<line x1="{left}" x2="{wide}" y1="{limit:.1f}" y2="{limit:.1f}" stroke="#cf3f3f" '
        f'stroke-dasharray="5 4"/><text x="{wide - 4}" y="{limit - 5:.1f}" text-anchor="end" '
        f'fill="#cf3f3f">limit: {LIMIT:g}</text>{marks}{dots}{first}</svg>'
        '<p class="facts">Stages from left to right, in order. Errors below a hundredth of the '
        "floor are drawn there; stages without a floor, a shape or finite numbers are not.</p>"
    )


def _parts(report: Report) -> Iterator[tuple[int, str]]:
    """Where in the stages the parts of the model begin."""
    starts = (("tower", TOWER), ("decoder", TEXT))
    for name, start in starts:
        at = next((n for n, row in enumerate(report.rows) if row.stage.startswith(start)), None)
        if at is not None:
            yield at, name


def _rows(report: Report) -> str:
    local = any(row.local_over is not None for row in report.rows)
    head = (
        '<table><tr><th></th><th>stage</th><th>in the dump</th><th class="n">error</th>'
        '<th class="n">floor</th><th class="n">x floor</th>'
        + ('<th class="n">own, x floor</th>' if local else "")
        + "</tr>"
    )
    body = []
    for number, row in enumerate(report.rows):
        status = status_of(row)
        text = "#1d2530" if status == "MISSING" else "#fff"
        numbers = (row.error, row.floor, row.over, *((row.local_over,) if local else ()))
        cells = "".join(f'<td class="n">{_number(value)}</td>' for value in numbers)
        body.append(
            f'<tr id="s{number}"><td><b style="background:{COLOURS[status]};color:{text}">{status}'
            f"</b></td><td>{html.escape(row.stage)}</td><td>{html.escape(_read_as(row))}</td>{cells}</tr>"
        )
    return f"{head}{''.join(body)}</table>"
