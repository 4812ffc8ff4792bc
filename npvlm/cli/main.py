"""The command group, and what every error becomes: one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from typing import NoReturn

import click

from npvlm import __version__
from npvlm.cli.bench import bench
from npvlm.cli.compare import compare
from npvlm.cli.convert import convert
from npvlm.cli.demo import demo
from npvlm.cli.explain import explain
from npvlm.cli.generate import generate
from npvlm.cli.interruption import Terminated, listen
from npvlm.cli.kit import kit
from npvlm.cli.replay import replay
from npvlm.cli.trace import trace
from npvlm.errors import NpvlmError

EXIT_CODES = """\b
Exit codes: 0 fine, 1 a check found a difference, 2 bad use,
3 a model, file or machine problem, 130 Ctrl-C, 143 SIGTERM."""


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="npvlm")
def npvlm() -> None:
    """PaliGemma and PaliGemma 2 on a plain CPU: ask pictures questions.

    \b
    npvlm demo                                     see it work in seconds
    npvlm generate photo.jpg --prompt "caption en" --model FOLDER
    npvlm convert FOLDER SMALLER --precision int8
    npvlm bench --synthetic paligemma-3b-224       how fast is this machine?
    npvlm trace photo.jpg --prompt "caption en"    every stage from picture to token
    npvlm compare REFERENCE MINE                   where does my own port go wrong?
    npvlm kit -o FOLDER                            all that checking a port takes
    """


npvlm.add_command(bench)
npvlm.add_command(compare)
npvlm.add_command(convert)
npvlm.add_command(demo)
npvlm.add_command(explain)
npvlm.add_command(generate)
npvlm.add_command(kit)
npvlm.add_command(replay)
npvlm.add_command(trace)


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    listen()
    # Numbers that overflow are met where they matter; a warning with a source line helps no one.
    warnings.simplefilter("ignore", RuntimeWarning)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as it is where the shell closed it
            # A path need not be UTF-8; its bytes come out as they went in.
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    sys.exit(_run())


def _run() -> int:
    """Run the command and name its exit code."""
    try:
        code = npvlm.main(standalone_mode=False)
        if sys.stdout is not None:
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
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted.", 130)
    except Terminated:
        return _fail("terminated.", 143)
    except MemoryError:
        return _fail("out of memory; use a smaller model, fewer pictures or another machine.", 3)
    except BrokenPipeError:
        return _closed_pipe()
    except OSError as error:
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}.", 3)
    except SystemExit:  # how click itself ends on a closed pipe; nothing else here raises it
        return _closed_pipe()


def _fail(message: str, code: int) -> int:
    click.echo(f"npvlm: {message}", err=True)
    return code


def _closed_pipe() -> int:
    """Whoever read our output has had enough: end quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
