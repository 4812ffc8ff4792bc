"""`npvlm fetch`."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING

import click

from npvlm.cli.interruption import Stopped

if TYPE_CHECKING:
    from npvlm.files.download import Remote, RemoteFile
    from npvlm.files.hub import Wanted


@click.command()
@click.argument("model", metavar="NAME|REPO")
@click.option(
    "--revision", metavar="NAME", help="A branch, tag or commit.  [default: the one in bfloat16]"
)
@click.option("--dry-run", is_flag=True, help="Say which files and bytes it would be; fetch none.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def fetch(model: str, revision: str | None, dry_run: bool, quiet: bool) -> None:
    """Bring a model from the Hugging Face hub, and print the folder it is in.

    \b
    npvlm fetch paligemma-3b-mix-224 --dry-run     how much would it be?
    npvlm fetch paligemma-3b-mix-224
    npvlm fetch someone/their-paligemma --revision v2

    NAME is one that `npvlm models` lists, REPO any repository as OWNER/NAME. Of a PaliGemma 1 the
    bfloat16 revision is taken, half as large as the main one. What is here already is checked, and
    what broke off goes on where it ended. The folder is in the cache that the hub's own tools use
    (HF_HOME); HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are theirs as well.
    """
    from npvlm.files import download, hub
    from npvlm.opening import BUNDLED

    def say(what: str) -> None:
        if not quiet:
            click.echo(f"npvlm: {what}", err=True)

    def begin(file: RemoteFile) -> None:
        if not sys.stderr.isatty():  # else a bar says it
            say(f"{file.name}, {_size(file.size)}")

    if revision is None and model in (path.name for path in BUNDLED.iterdir() if path.is_dir()):
        say(f"{model} is in the box; nothing to fetch")
        click.echo(BUNDLED / model)
        return
    wanted = _wanted(model, revision)
    try:
        remote = download.look_up(wanted)
    except download.NotAsked:
        folder = hub.snapshot_of(wanted)
        if folder is None or dry_run:
            raise
        say(f"{wanted.name} is here, as far as one can tell without asking the hub")
        click.echo(folder)
        return
    if remote.gated:
        say(f"its terms must be accepted on {wanted.page}")
    if dry_run:
        click.echo(_listing(remote))
        return
    total, left = sum(file.size for file in remote.files), remote.bytes_to_come()
    say(f"{wanted.repo} at {remote.revision}: {_size(total)}, {_size(left)} of it to come")
    try:
        folder = download.fetch(remote, begin, say, quiet)
    except Stopped:
        say("what has come is kept: run the same again to go on.")
        raise
    click.echo(folder)


def _wanted(model: str, revision: str | None) -> Wanted:
    """What was asked for, or what may have been meant."""
    from npvlm.files.hub import parse_name
    from npvlm.files.published import PUBLISHED

    wanted = parse_name(f"{model}@{revision}" if revision else model)
    if wanted is None:
        near = get_close_matches(model, PUBLISHED, n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise click.UsageError(
            f"{model!r} is no published model, expected one of `npvlm models`, or OWNER/NAME{meant}"
        )
    return wanted


def _listing(remote: Remote) -> str:
    """Every file with its bytes, and what is here of it."""
    lines = [
        f"{file.size:>17,}  {file.name}{'  (here)' * remote.is_here(file)}" for file in remote.files
    ]
    total, left = sum(file.size for file in remote.files), remote.bytes_to_come()
    last = f"{total:>17,}  in all, {left:,} to come, into {remote.snapshot}"
    return "\n".join([*lines, last])


def _size(count: int) -> str:
    """Bytes for the eye."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
