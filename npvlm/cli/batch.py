"""`npvlm batch`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from npvlm.cli.asking import max_tokens_option, note_image_marks
from npvlm.cli.interruption import Stopped
from npvlm.cli.options import (
    adapter_option,
    model_option,
    named_model,
    open_model,
    precision_option,
    quiet_option,
    threads_option,
)
from npvlm.cli.progress import ProgressLine, counted

if TYPE_CHECKING:
    from npvlm.work.batch import Progress
    from npvlm.work.batch_input import Item
    from npvlm.work.memory import Memory

ERRORS_SAID = 3  # on stderr; all are in the records
# Which options a task takes.
TASKS = {
    "caption": ("lang",),
    "ask": ("question", "lang"),
    "ocr": (),
    "detect": ("labels",),
    "segment": ("labels",),
}


def _shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int]:
    """Read I/N."""
    number, _, count = (value or "1/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise click.BadParameter(f"{value!r} is no part of several, expected one such as 1/4.")
    return int(number), int(count)


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="IN...")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Where the records go: a line of JSON for each picture, in order; or a table of them, if "
    "the name ends in .parquet.",
)
@click.option("--task", type=click.Choice(list(TASKS)), help="What to do with every picture.")
@click.option("--labels", help='What to detect or segment: "cat", or "cat ; dog".')
@click.option("--question", help="What to ask.")
@click.option("--lang", help="Of captions and answers.  [default: en]")
@click.option("--prompt", help="In place of --task: the prompt as the model reads it.")
@click.option("--resume", is_flag=True, help="Go on after the records that the file holds.")
@click.option(
    "--shard", callback=_shard, metavar="I/N", help="Only the I-th of N even parts of the input."
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Write a contact sheet, too: one file if the name ends in .html, else a folder.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Answer in this process, or on a Ray cluster (needs the extra `ray`).",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Of the cluster's head, or auto.  [default: $RAY_ADDRESS, else one on this machine]",
)
@max_tokens_option
@model_option
@adapter_option
@precision_option
@threads_option
@quiet_option
def batch(
    inputs: tuple[str, ...],
    output: Path,
    task: str | None,
    labels: str | None,
    question: str | None,
    lang: str | None,
    prompt: str | None,
    resume: bool,
    shard: tuple[int, int],
    html: Path | None,
    engine: str,
    address: str | None,
    max_tokens: int | None,
    model: str | None,
    adapter: Path | None,
    precision: str | None,
    quiet: bool,
) -> int:
    """Answer about any number of pictures: a record each, in a file that can be gone on with.

    IN are files, folders and patterns; or one list, a .jsonl or .csv file with `image`, a path as
    seen from the list, and `prompt`, which --task or --prompt may replace; or .parquet files, whose
    `image` may be the bytes of pictures. Other fields of a list are kept in the records.

    \b
    npvlm batch photos/ --task caption -o captions.jsonl --html report.html
    npvlm batch 'scans/**/*.png' --task detect --labels "cat ; dog" -o pets.jsonl
    npvlm batch questions.csv -o answers.jsonl --resume
    npvlm batch photos/ --task ocr --shard 2/4 -o part2.jsonl
    npvlm batch FOLDER --task ocr --engine ray --address head:6379 -o texts.parquet

    A record has what `generate --json` has but for timings and the ids of the prompt, so equal
    inputs give equal bytes; or `error`. It is on disk as soon as it is written: after a kill at any
    moment, the same command with --resume goes on, and the file ends up the same. Records of shards
    join with `cat`, in order.

    Exit codes: 0 all are answered, 3 some records are errors (they stay; --resume asks no second
    time), or a problem that ended it; 2, 129, 130, 143 as everywhere.
    """
    asked = prompt_of(task, prompt, labels=labels, question=question, lang=lang)

    if address is not None and engine != "ray":
        raise click.UsageError("--address goes with --engine ray only.")

    from npvlm.work.batch import run_batch
    from npvlm.work.batch_input import part, read_input
    from npvlm.work.batch_output import is_table, while_running, write_whole
    from npvlm.work.batch_places import check_places

    everything = read_input(inputs, asked)
    check_places(output, html, inputs, everything)
    items, running = part(everything, *shard), while_running(output, resume)
    was_whole = is_table(output)
    named = named_model(model, quiet)
    connected: AbstractContextManager[None] = nullcontext()
    answers = None
    if engine == "ray":
        from npvlm.work.cluster import answer_on_cluster, cluster, open_unread

        opened, connected, answers = (
            open_unread(named, precision, adapter),
            cluster(address),
            answer_on_cluster,
        )
    else:
        opened = open_model(named, precision, "kernels", quiet, adapter)
    if not quiet:
        note_image_marks(opened, " ".join(dict.fromkeys(item.prompt or "" for item in items)))
    line, last = ProgressLine("pictures", quiet), None
    errors = Errors(output, line)

    def tell(progress: Progress) -> None:
        nonlocal last
        last = progress
        line.show(progress.done, progress.total, progress.kept, progress.errors)

    try:
        with connected:
            last, memory = run_batch(
                *(opened, items, output, tell, errors.add),
                max_tokens=max_tokens,
                resume=resume,
                engine=answers,
            )
    except Stopped:
        line.clear()
        if last is not None:
            note = f"{last.done} of {last.total} records are in {running}; --resume goes on."
            click.echo(f"npvlm: {note}", err=True)
        raise
    finally:
        line.clear()
    if engine == "ray":
        memory = None  # of this process alone, which does little
    places = f"records in {output}"
    try:
        if html is not None:
            _write_sheet(items, output if was_whole else running, html, quiet)
            places += f", contact sheet in {html}"
    finally:  # the records are there all the same
        if not was_whole:
            write_whole(running, output)
        if not quiet:
            click.echo(f"npvlm: {_summary(last, memory)}; {places}", err=True)
        elif last.errors and not errors.count:
            click.echo(f"npvlm: {counted(last.errors, 'error')} from before in {output}", err=True)
    return 3 if last.errors else 0


class Errors:
    """The first errors, said on stderr as they come, and where the others are."""

    def __init__(self, output: Path, line: ProgressLine) -> None:
        self._output, self._line = output, line
        self.count = 0

    def add(self, path: Path, error: str) -> None:
        """Say an error, of a picture or in the list at `path`, unless enough are said."""
        self.count += 1
        if self.count > ERRORS_SAID + 1:
            return
        self._line.clear()
        if self.count > ERRORS_SAID:
            error = f"more errors are in {self._output}"
        elif not error.startswith(str(path)):
            error = f"{path}: {error}"
        click.echo(f"npvlm: {error}", err=True)


def _write_sheet(items: Sequence[Item], output: Path, html: Path, quiet: bool) -> None:
    from npvlm.work.batch_output import read_records
    from npvlm.work.contact_sheet import contact_sheet

    line = ProgressLine("thumbnails", quiet)
    try:
        contact_sheet(items, read_records(output), html, line.show)
    finally:
        line.clear()


def _summary(ended: Progress, memory: Memory | None) -> str:
    """What a run did, in one line."""
    new = ended.done - ended.kept
    parts = [counted(new, "picture"), counted(ended.errors, "error"), f"{ended.seconds:.1f} s"]
    if ended.kept:
        parts.insert(1, f"{ended.kept} from before")
    if new:
        tokens = ended.tokens / ended.seconds
        parts += [f"{ended.rate:.2f} pictures/s", f"{tokens:.1f} tokens/s"]
    if memory is not None:
        parts.append(f"{memory.resident / 1e6:,.0f} MB of memory at most")
    return ", ".join(parts)


def prompt_of(task: str | None, prompt: str | None, **given: str | None) -> str | None:
    """The one prompt for all pictures, None where a list shall have them."""
    present = [name for name, value in given.items() if value is not None]
    if task is not None and prompt is not None:
        raise click.UsageError("--task and --prompt both say what to do; give one of them.")
    wrong = [name for name in present if name not in TASKS.get(task or "", ())]
    if wrong:
        fitting = " or ".join(name for name, takes in TASKS.items() if wrong[0] in takes)
        raise click.UsageError(f"--{wrong[0]} goes with --task {fitting} only.")
    if task is None:
        return prompt

    from npvlm.answers import tasks

    labels, question, lang = given["labels"], given["question"], given["lang"] or "en"
    if task in ("detect", "segment"):
        if labels is None:
            raise click.UsageError(f'--task {task} needs --labels, such as --labels "cat ; dog".')
        return (tasks.detect_prompt if task == "detect" else tasks.segment_prompt)(labels)
    if task == "ask":
        if question is None:
            raise click.UsageError('--task ask needs --question, such as "what is this?".')
        return tasks.ask_prompt(question, lang)
    return tasks.ocr_prompt() if task == "ocr" else tasks.caption_prompt(lang)
