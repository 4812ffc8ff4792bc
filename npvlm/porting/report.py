"""A comparison in words: a table for the terminal, and a page for the browser."""

from __future__ import annotations

import html
import math
from pathlib import Path

from npvlm.files.output import new_file
from npvlm.porting.compare import LIMIT, Report, Row

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
    head = f"{'':8}{'stage':<{wide}}  {'error':>9}  {'x floor':>9}"
    lines = [head + (f"  {'own':>9}" if local else "") + "  read as"]
    for row in report.rows:
        own = f"  {_number(row.local_over):>9}" if local else ""
        line = (
            f"{row.status:<8}{row.stage:<{wide}}  {_number(row.error):>9}  "
            f"{_number(row.over):>9}{own}  {_read_as(row)}"
        )
        lines.append(line.rstrip())
    return "\n".join([*lines, "", report.verdict.sentence])


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
 td b {{ color: #fff; padding: 0 .4em; border-radius: 3px; font-weight: 600; }}
</style>
<h1>{html.escape(title)}</h1>
<div class="verdict"><p>{html.escape(verdict.sentence)}</p></div>
<p class="facts">{html.escape(report.mine)} held against {html.escape(report.reference)},
 as {report.precision}; more than {LIMIT:g} times the noise floor differs.</p>
<div class="legend">{legend}</div>
<div class="strip">{_strip(report)}</div>
<h2>Error over noise floor, stage by stage</h2>
{_chart(report)}
<h2>Stages</h2>
{_rows(report)}
</html>
"""


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
    dots = "".join(
        f'<circle cx="{across(number):.1f}" cy="{up(over):.1f}" r="3" fill="{COLOURS[status]}">'
        f"<title>{html.escape(report.rows[number].stage)}: {over:.3g}</title></circle>"
        for number, over, status in points
    )
    return (
        f'<svg viewBox="0 0 {wide} {high}" font-size="12" fill="#5b6673" role="img">{grid}'
        f'<line x1="{left}" x2="{wide}" y1="{limit:.1f}" y2="{limit:.1f}" stroke="#cf3f3f" '
        f'stroke-dasharray="5 4"/><text x="{wide - 4}" y="{limit - 5:.1f}" text-anchor="end" '
        f'fill="#cf3f3f">limit: {LIMIT:g}</text>{dots}</svg>'
    )


def _rows(report: Report) -> str:
    head = (
        '<table><tr><th></th><th>stage</th><th>in the dump</th><th class="n">error</th>'
        '<th class="n">floor</th><th class="n">x floor</th><th class="n">own</th></tr>'
    )
    body = []
    for number, row in enumerate(report.rows):
        status = status_of(row)
        text = "#1d2530" if status == "MISSING" else "#fff"
        numbers = (row.error, row.floor, row.over, row.local_over)
        cells = "".join(f'<td class="n">{_number(value)}</td>' for value in numbers)
        body.append(
            f'<tr id="s{number}"><td><b style="background:{COLOURS[status]};color:{text}">{status}'
            f"</b></td><td>{html.escape(row.stage)}</td><td>{html.escape(_read_as(row))}</td>{cells}</tr>"
        )
    return f"{head}{''.join(body)}</table>"
