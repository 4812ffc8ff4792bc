"""How kernels are compiled, and where they are kept between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numba
from numba.core import event
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target

# A thread that waits for the next kernel does so awake for 0.1 ms (waking it takes half of that),
# then asleep: on a busy machine it would be taking the core from the very thread it waits for. Read
# by GNU's thread library when the first kernel starts.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _folder() -> Path:
    """One folder for each version of the kernels: numba alone sees edits in one file, not in all.

    And one for each CPU, so that no process ever meets code for another. It lies in
    $NUMBA_CACHE_DIR, else in $XDG_CACHE_HOME, else in ~/.cache.
    """
    cpu = cpu_target.target_context.codegen().magic_tuple()
    version = hashlib.sha256(f"{numba.__version__} {cpu}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        version.update(source.read_bytes())
    places = (os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME"), "~/.cache")
    place = next(filter(None, places))
    folder = Path(place) / "npvlm" / f"kernels-{version.hexdigest()[:16]}"
    with suppress(RuntimeError):  # there is no home: then ~ stays as it is
        folder = folder.expanduser()
    return folder


def _is_writable(folder: Path) -> bool:
    if folder.parts[0] == "~":
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _copy(folder: Path) -> tempfile.TemporaryDirectory[str] | None:
    """A copy of kernels that can only be read, for this process: numba uses no other folder."""
    if not any(folder.rglob("*.nbi")):
        return None
    try:
        copy = tempfile.TemporaryDirectory(prefix="npvlm-", ignore_cleanup_errors=True)
        shutil.copytree(folder, copy.name, copy_function=shutil.copyfile, dirs_exist_ok=True)
    except OSError:
        return None
    return copy


FOLDER = _folder()
WRITABLE = _is_writable(FOLDER)
COPY = None if WRITABLE else _copy(FOLDER)


class _Cache(FunctionCache):
    """What numba keeps of a function; whatever is wrong with a file, it is compiled again."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Read compiled code for arguments of these types, if there is any.

        Two processes that compile for different types at once may give their files the same name.
        """
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # what reading a damaged file may raise is anything
            with suppress(OSError):
                self.flush()
            return None
        return found if found is not None and found.signature.args == tuple(sig) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk: then it is not kept
            super().save_overload(sig, data)


def _keep(dispatcher: Any) -> Any:
    if WRITABLE or COPY:
        dispatcher._cache = _Cache(dispatcher.py_func)
    return dispatcher


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called.

    Other threads of Python run on while it does; x / 0 is inf or nan, as it is in NumPy.
    """
    return _keep(numba.njit(nogil=True, error_model="numpy")(function))


def parallel(function: Callable[..., Any]) -> Any:
    """The same, with a `prange` that is shared among the threads."""
    return _keep(numba.njit(nogil=True, error_model="numpy", parallel=True)(function))


def threads_end_at_fork() -> bool:
    """Whether kernels have run on threads without which a forked child cannot run any.

    GNU's library cannot start them anew, and numba ends a process that tries. Its other libraries
    for threads can.
    """
    try:
        return sys.platform == "linux" and numba.threading_layer() == "omp"
    except ValueError:  # no threads were started
        return False


@contextmanager
def kept() -> Iterator[None]:
    """Let functions that are marked as compiled in here be kept in the folder."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = COPY.name if COPY else str(FOLDER)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


class _Listener(event.Listener):
    """Calls a function when numba begins something, and another when it ends."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.begin, self.end = begin, end

    def on_start(self, event: Any) -> None:
        self.begin()

    def on_end(self, event: Any) -> None:
        self.end()


def tell_of_compiling(say: Callable[[str], None]) -> None:
    """Call `say` with one sentence should a kernel have to be compiled, before it is.

    What is found on disk is not compiled.
    """
    told: list[str] = []

    def tell() -> None:
        if told:
            return
        told.append(
            "compiling kernels for this CPU, once each; this takes about 15 seconds."
            if WRITABLE
            else f"compiling kernels in every run, which takes about 15 seconds: {FOLDER} cannot "
            "be written; let NUMBA_CACHE_DIR name a folder that can."
        )
        say(told[0])

    event.register("numba:compile", _Listener(tell, lambda: None))


def wrap_compiler(begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Have numba call `begin` and `end` around whatever it compiles, loads and keeps.

    The calls are nested; neither is made where LLVM calls back, so both may raise.
    """
    event.register("numba:compiler_lock", _Listener(begin, end))
