"""The command group, and what every error becomes: one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import warnings

import click

from npvlm import __version__
from npvlm.cli.batch import batch
from npvlm.cli.bench import bench
from npvlm.cli.caption import ask, caption, ocr
from npvlm.cli.chat import chat
from npvlm.cli.compare import compare
from npvlm.cli.convert import convert
from npvlm.cli.demo import demo
from npvlm.cli.detect import detect, segment
from npvlm.cli.doctor import doctor
from npvlm.cli.embed import embed
from npvlm.cli.explain import explain
from npvlm.cli.features import features
from npvlm.cli.fetch import fetch
from npvlm.cli.generate import generate
from npvlm.cli.inspect import inspect
from npvlm.cli.kit import kit
from npvlm.cli.models import models
from npvlm.cli.replay import replay
from npvlm.cli.score import score
from npvlm.cli.search import search
from npvlm.cli.tokens import tokens
from npvlm.cli.trace import trace
from npvlm.errors import NpvlmError, why

EXIT_CODES = """\b
Exit codes: 0 fine, 1 a check found a difference, 2 bad use,
3 a model, file or machine problem, 130 Ctrl-C, 143 SIGTERM,
129 a closed terminal."""


# What --help lists under which heading.
COMMANDS: dict[str, list[click.Command]] = {
    "Ask pictures": [demo, caption, ask, ocr, detect, segment, chat, batch, generate],
    "How sure, and why": [score, explain],
    "Find pages": [embed, search],
    "Numbers": [features],
    "Models": [models, fetch, convert, inspect, tokens],
    "This machine": [doctor, bench],
    "Port PaliGemma": [trace, compare, replay, kit],
}


class Commands(click.Group):
    """A group whose help lists commands by what they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each heading."""
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(c.name or "", c.get_short_help_str(200)) for c in commands])


@click.group(
    cls=Commands,
    epilog=EXIT_CODES,
    # Where there is no terminal, click would take out what looks like a colour: data, here.
    context_settings={"help_option_names": ["-h", "--help"], "color": True},
)
@click.version_option(__version__, prog_name="npvlm")
def npvlm() -> None:
    """PaliGemma and PaliGemma 2 on a plain CPU: ask pictures questions.

    \b
    npvlm demo                             see it work in seconds
    npvlm fetch paligemma-3b-mix-224       bring a model
    npvlm caption photo.jpg --model paligemma-3b-mix-224
    npvlm detect photo.jpg "cat ; dog" -o boxes.png --model paligemma-3b-mix-224
    """


# How the linker and the inside of Python say that there is no memory.
_NO_ROOM = ("failed to map segment", "without setting an exception", "without exception set")

for group in COMMANDS.values():
    for command in group:
        npvlm.add_command(command)


def run() -> int:
    """Run the command and name its exit code; whatever ends it is said in one line."""
    # Numbers that overflow are met where they matter; a warning with a source line helps no one.
    warnings.simplefilter("ignore", RuntimeWarning)
    try:
        code = npvlm.main(standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        command = (
            error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        )
        hint = f" (see {command} --help)" if command else ""
        return _fail(" ".join(error.format_message().split()) + hint, 2)
    except NpvlmError as error:
        return _fail(str(error), error.exit_code)
    except (MemoryError, ImportError, SystemError) as error:
        if not isinstance(error, MemoryError) and not any(no in str(error) for no in _NO_ROOM):
            raise
    except BrokenPipeError:
        return _closed_pipe()
    except OSError as error:
        if error.errno is None:  # a library's, of what it loads
            said = why(error).partition(". ")[0]
            return _fail(f"{said}; is there memory for it, and is it installed whole?", 3)
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}.", 3)
    except SystemExit:  # how click itself ends on a closed pipe; nothing else here raises it
        return _closed_pipe()
    # Only now: the error is gone, and with it what was in hand.
    return _fail(
        "out of memory; use a smaller model, fewer pictures or beams, or another machine.", 3
    )


def _fail(message: str, code: int) -> int:
    click.echo(f"npvlm: {message}", err=True, color=True)
    return code


def _closed_pipe() -> int:
    """Whoever read our output has had enough: end quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
