"""How kernels are compiled, and where they are kept between runs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numba

# A thread that waits for the others sleeps: spinning would take the core from whoever else is busy
# on it, the late thread included. Read by the threads' library when the first kernel starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _folder() -> Path:
    """One folder for each version of the kernels: numba alone sees edits in one file, not in all.

    It lies in $NUMBA_CACHE_DIR, else in $XDG_CACHE_HOME, else in ~/.cache.
    """
    version = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        version.update(source.read_bytes())
    places = (os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME"), "~/.cache")
    place = next(filter(None, places))
    return Path(place).expanduser() / "npvlm" / f"kernels-{version.hexdigest()[:16]}"


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return False


FOLDER = _folder()
WRITABLE = _is_writable(FOLDER)
FILLED = WRITABLE and any(FOLDER.rglob("*.nbi"))


# Other threads of Python run on while a kernel does; x / 0 is inf or nan, as it is in NumPy.
compiled = numba.njit(nogil=True, cache=WRITABLE, error_model="numpy")
parallel = numba.njit(nogil=True, cache=WRITABLE, error_model="numpy", parallel=True)


@contextmanager
def kept() -> Iterator[None]:
    """Let functions that are marked as compiled in here be kept in the folder."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(FOLDER)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
