"""`npvlm detect` and `npvlm segment`: things on pictures, as boxes and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npvlm.cli.asking import (
    answer_all,
    box_columns,
    find_pictures,
    is_one,
    max_tokens_option,
    paths_of,
    split_last,
)
from npvlm.cli.lines import line
from npvlm.cli.options import (
    adapter_option,
    model_option,
    named_model,
    open_model,
    precision_option,
    quiet_option,
    threads_option,
)

if TYPE_CHECKING:
    from npvlm.answers.detection import Detection

FORMATS = ("text", "json", "coco", "yolo", "csv")


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what both have in common."""
    for option in (
        threads_option,
        quiet_option,
        click.option("--json", "as_json", is_flag=True, help="The same as --format json."),
        max_tokens_option,
        precision_option,
        adapter_option,
        model_option,
        click.option(
            "--bins",
            type=click.Choice(["1024", "1023"]),
            default="1024",
            show_default=True,
            help="What locations count up to: as Google's demo has it, or as big_vision has it.",
        ),
        click.option(
            "--format",
            "form",
            type=click.Choice(FORMATS),
            help="Of what goes to stdout.  [default: text: label, x0, y0, x1, y1, confidence]",
        ),
        click.option(
            "-o",
            "--output",
            type=click.Path(path_type=Path),
            metavar="PNG|FOLDER",
            help="Where drawn pictures go: a name that ends in .png is a file, any other a folder.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGE... LABELS")
@_options
def detect(images: tuple[str, ...], **given: Any) -> int:
    """Find things on each IMAGE: LABELS, with semicolons between them.

    An IMAGE is a file, a folder, a pattern, or - for stdin. Each thing is a line on stdout; corners
    are in pixels of the picture as it is. Several pictures have their paths in front.

    \b
    npvlm detect street.jpg "car ; bicycle" -o boxes.png
    npvlm detect photos/ "person" --format coco > people.json
    """
    from npvlm.answers.tasks import detect_prompt

    pictures, labels = split_last(images, "LABELS")
    return _find(pictures, detect_prompt(labels), cutouts=None, **given)


@click.command()
@click.argument("images", nargs=-1, metavar="IMAGE... LABELS")
@click.option(
    "--cutouts",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Also each thing alone, as a PNG that is clear around it.",
)
@_options
def segment(images: tuple[str, ...], cutouts: Path | None, **given: Any) -> int:
    """Find things on each IMAGE and the pixels that are theirs. Use as of `npvlm detect`.

    Masks are in the formats json (run lengths and polygons) and coco (run lengths), and washed into
    the drawn picture.

    \b
    npvlm segment cat.jpg "cat" -o mask.png --cutouts things/
    npvlm segment photos/ "car" --format coco > cars.json
    """
    from npvlm.answers.tasks import segment_prompt

    pictures, labels = split_last(images, "LABELS")
    return _find(pictures, segment_prompt(labels), cutouts=cutouts, **given)


def _find(
    images: Sequence[str],
    prompt: str,
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    max_tokens: int | None,
    output: Path | None,
    cutouts: Path | None,
    form: str | None,
    bins: str,
    as_json: bool,
    quiet: bool,
) -> int:
    """Ask, print and draw each picture's things as they come."""
    from npvlm.answers.formats import COLUMNS, coco, csv_line, csv_lines, yolo_lines
    from npvlm.answers.lines import json_line
    from npvlm.answers.tasks import labels_of
    from npvlm.work.gallery import Gallery

    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form} exclude each other: name one.")
    form = "json" if as_json else form or "text"
    pictures = find_pictures(images)
    several = not is_one(images)
    gallery = Gallery(output, cutouts, paths_of(pictures), [Path(name) for name in images])
    opened = open_model(named_model(model, quiet), precision, "kernels", quiet, adapter)
    kept: list[Detection] = []
    labels = labels_of(prompt)
    if form == "csv":
        click.echo(csv_line(COLUMNS))

    def show(result: Any) -> None:
        if form == "json":
            click.echo(result.to_json())
        elif form == "coco":
            kept.append(result)
        elif form == "csv":
            _echo_all(csv_lines(result))
        else:
            front = [str(result.answer.image)] if several else []
            if form == "yolo":
                _echo_all(line([*front, text]) for text in yolo_lines(result, numbers))
            else:
                _echo_all(line([*front, *box_columns(box)]) for box in result.boxes)
        gallery.add(result)
        if not quiet:
            _remark(result)

    numbers = {label: number for number, label in enumerate(labels)}
    code = answer_all(opened, pictures, prompt, max_tokens, show, quiet, int(bins))
    if form == "coco":
        click.echo(json_line(coco(kept)))
    if form == "yolo" and not quiet:
        classes = ", ".join(f"{number} {label}" for label, number in numbers.items())
        click.echo(f"npvlm: classes: {classes}", err=True)
    if not quiet and output is not None:
        what = "1 picture" if gallery.drawn == 1 else f"{gallery.drawn} pictures"
        click.echo(f"npvlm: {what} drawn: {output}", err=True)
    if not quiet and cutouts is not None:
        what = "1 thing" if gallery.cut == 1 else f"{gallery.cut} things"
        click.echo(f"npvlm: {what} cut out: {cutouts}", err=True)
    return code


def _echo_all(lines: Any) -> None:
    for text in lines:
        click.echo(text)


def _remark(result: Detection) -> None:
    """Say what the output does not show: nothing found, text that is no box."""
    name = result.answer.image
    if not result.boxes:
        click.echo(f"npvlm: {name}: nothing found.", err=True)
    others = dict.fromkeys(b.label for b in result.boxes if b.label not in ("", *result.labels))
    if others:
        click.echo(f"npvlm: {name}: not asked for: {', '.join(others)}", err=True)
    for text in result.unread:
        click.echo(f"npvlm: {name}: no box: {text!r}", err=True)
