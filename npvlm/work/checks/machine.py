"""Checks of what npvlm runs on: Python, libraries, the CPU, where kernels are kept, the room."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from npvlm.files.memory import available_memory
from npvlm.kernels import compiling
from npvlm.kernels.bandwidth import threads
from npvlm.kernels.matrices import has_matrices
from npvlm.kernels.tiles import BFLOAT16, BYTE_PRODUCTS
from npvlm.kernels.vectors import features
from npvlm.work.bench import machine
from npvlm.work.checks.finding import NOTE, OK, Check, Finding

LIBRARIES = ("numpy", "numba", "llvmlite", "pillow", "safetensors", "sentencepiece", "click")
PYTHONS = ((3, 11), (3, 13))  # the oldest and the newest that npvlm is tested with
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512vnni", "avx512bf16", "amx-int8")
LITTLE = 10**9  # bytes of memory or disk below which something is said
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def machine_checks() -> list[tuple[str, Check]]:
    """All of them, with their names."""
    return [
        ("Python", _python),
        ("libraries", _libraries),
        ("CPU", _cpu),
        ("threads", _threads),
        ("kernels", _kernels),
        ("BLAS", _blas),
        ("kernel cache", _cache),
        ("memory", _memory),
        ("disk", _disk),
    ]


def _python() -> Finding:
    said = f"{platform.python_version()}, {platform.platform()}"
    oldest, newest = PYTHONS
    if oldest <= sys.version_info[:2] <= newest:
        return Finding("Python", OK, said)
    tested = " to ".join(".".join(map(str, python)) for python in PYTHONS)
    return Finding("Python", NOTE, f"{said}; npvlm is tested with {tested}")


def _libraries() -> Finding:
    return Finding("libraries", OK, ", ".join(f"{name} {_version(name)}" for name in LIBRARIES))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"


def _cpu() -> Finding:
    there = features()
    has = [name for name in FEATURES if name in there]
    lacks = [name for name in FEATURES if name not in there]
    said = f"{machine()['cpu']} with {', '.join(has) or 'none of the features looked for'}"
    said += f"; without {', '.join(lacks)}" if lacks else ""
    if platform.machine() in ("x86_64", "AMD64") and "fma" not in there:
        return Finding("CPU", NOTE, f"{said}: kernels are slow without fma")
    return Finding("CPU", OK, said)


def _threads() -> Finding:
    return Finding("threads", OK, f"{threads()} for the kernels, of {_cores()} cores")


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _kernels() -> Finding:
    used = (f"{precision} {how}" for precision, how in kernels_used(features()).items())
    return Finding("kernels", OK, "; ".join(used))


def kernels_used(there: frozenset[str]) -> dict[str, str]:
    """For each precision how products are done by a CPU that has these features."""
    wide = next(
        (name for feature, name in _VECTORS.items() if feature in there), "vectors of this CPU"
    )
    added = "fused" if "fma" in there or "neon" in there else "by the library of C, slowly"
    byte_pairs = "bytes by pairs, AVX2" if "avx2" in there else "bytes widened to 16 bits"
    word_pairs = "16 bits by pairs, AVX2" if "avx2" in there else "16 bits widened to 32"
    dot = "dot products of bytes, AVX512-VNNI"
    unit = "the matrix unit, AMX" if has_matrices() else None
    pairs = "dot products, AVX512-BF16" if BFLOAT16 else "pairs split, then as float32"
    return {
        "float32": f"multiply-add {added}, {wide}",
        "bfloat16": unit or pairs,
        "int8": f"{unit}; few rows: {dot}" if unit else dot if BYTE_PRODUCTS else word_pairs,
        "int4": dot if BYTE_PRODUCTS else byte_pairs,
    }


_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "neon": "NEON"}


def _blas() -> Finding:
    """NumPy's own library of products: the definitions run on it, the kernels do not."""
    settings = np.show_config(mode="dicts")
    built = settings.get("Build Dependencies", {}) if isinstance(settings, dict) else {}
    blas = built.get("blas", {})
    said = f"{blas.get('name', 'of unknown name')} {blas.get('version', '')}".strip()
    told = [f"{name}={os.environ[name]}" for name in _BLAS_THREADS if name in os.environ]
    count = ", ".join(told) or "as many threads as it likes"
    return Finding("BLAS", OK, f"{said}, {count} (for --ops numpy alone)")


def _cache() -> Finding:
    folder = compiling.FOLDER
    own, all_of_them = _size(folder), _size(folder.parent)
    said = f"{folder}, {own / 1e6:.1f} MB"
    if all_of_them > own:
        said += f" (and {(all_of_them - own) / 1e6:.1f} MB of other versions or CPUs beside it)"
    if compiling.WRITABLE:
        return Finding("kernel cache", OK, said)
    how = "read from a copy" if compiling.COPY else "compiled in every run"
    advice = "let NUMBA_CACHE_DIR name a folder that can"
    return Finding("kernel cache", NOTE, f"{folder} cannot be written: {how}; {advice}")


def _size(folder: Path) -> int:
    """The bytes of all files in a folder; other processes may be taking some away."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _memory() -> Finding:
    free = available_memory()
    if free is None:
        return Finding("memory", NOTE, "the system does not say what is free")
    return Finding("memory", OK if free >= LITTLE else NOTE, f"{free / 1e9:.1f} GB free")


def _disk() -> Finding:
    place = Path.cwd()
    free = shutil.disk_usage(place).free
    verdict = OK if free >= LITTLE else NOTE
    return Finding("disk", verdict, f"{free / 1e9:.1f} GB free at {place}")
