"""A bench's report as a table in Markdown that is aligned for the eye as well."""

from __future__ import annotations

from npvlm.work.bench import Figures, Report

_UNKNOWN = "-"


def table(report: Report) -> str:
    """What was run, the figures of each side with their ratios, and what the machine allows."""
    plan, machine, ratios = report.plan, report.machine, report.ratios
    sides = [report.npvlm] + ([report.against] if report.against else [])
    pictures = "1 picture" if plan.batch == 1 else f"{plan.batch} pictures together"
    work = f"{pictures} of {report.image_tokens} + {plan.prompt_tokens} tokens"
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("python", "numpy", "numba"))
    lines = [
        f"{report.model}, {report.precision}",
        f"{work}, {plan.new_tokens} new; medians of {plan.repeat}",
        f"{machine['cpu']}, {machine['threads']} threads; {libraries}",
        "",
    ]
    head = ["", *(side.name for side in sides)] + (["times as fast"] if ratios else [])
    rows = [head]
    for title, part, show in (
        ("load", "load", _seconds),
        ("image tower", "image", _seconds),
        ("prefill", "prefill", _seconds),
        ("first token", "first_token", _seconds),
        ("decode, tokens/s", "decode", _rate),
        ("peak anonymous memory", "anonymous", _megabytes),
        ("- of it before the first round", "anonymous_before", _megabytes),
        ("peak resident memory", "resident", _megabytes),
    ):
        cells = [show(getattr(side, part)) for side in sides]
        ratio = [f"{ratios[part]:.2f}" if part in ratios else ""] if ratios else []
        rows.append([title, *cells, *ratio])
    if all(side.first_token is not None for side in sides):
        rows.append(["first token's id", *map(_first_ids, sides)] + [""] * bool(ratios))
    lines += [*_aligned(rows), "", *_aligned(_limits(report))]
    return "\n".join(lines)


def _limits(report: Report) -> list[list[str]]:
    limits = report.limits
    rows, width, out = limits.product
    return [
        ["this machine", "rate", "reached"],
        ["reading 1 GB with all threads", _gigabytes(limits.bandwidth), ""],
        [
            f"- weights of a decoding step ({limits.decode_bytes / 1e9:.3g} GB)",
            _gigabytes(limits.decode_rate),
            _percent(limits.decode_fraction),
        ],
        [
            "- the same over its linear layers alone",
            _gigabytes(limits.decode_linear_rate),
            _percent(limits.decode_linear_fraction),
        ],
        [f"one linear layer, {rows} x {width} to {out}", _giga(limits.product_rate), ""],
        [
            "- linear layers of a prefill",
            _giga(limits.prefill_linear_rate),
            _percent(limits.prefill_linear_fraction),
        ],
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    """A Markdown table: the first row is its head, columns after the first are numbers."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in [rows[0], rule, *rows[1:]]
    ]
    return [f"| {' | '.join(row)} |" for row in padded]


def _first_ids(side: Figures) -> str:
    ids = side.rounds[0].tokens
    return ", ".join(map(str, ids[:2])) + (", ..." if len(ids) > 2 else "")


def _seconds(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.3f} s"


def _rate(value: float) -> str:
    return f"{value:.2f}"


def _megabytes(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value / 1e6:,.0f} MB"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB/s"


def _giga(value: float) -> str:
    return f"{value / 1e9:.1f} GFLOP/s"


def _percent(value: float) -> str:
    return f"{value:.0%}"
