"""The house keeps its shape: imports point one way, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import npvlm

PACKAGE = Path(npvlm.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Which parts of npvlm each part may import, besides itself.
MAY_IMPORT = {
    "errors": set(),
    "computing": {"errors"},
    "config": {"errors"},
    "model": {"config"},
    "kernels": {"model.ops", "model.weights", "model.tap"},
    "files": {"config", "errors", "model.vqvae", "model.weights"},
    "decoding": {"model", "config", "errors"},
    "answers": {"errors", "config", "model", "files.output", "files.pictures", "decoding"},
    "asked": {"errors", "model.weights", "files.pictures", "answers.lines"},
    "packs": {"model.ops", "decoding", "answers.confidence", "asked"},
    "opening": {"computing", "errors", "config", "model", "kernels", "files"},
    "api": {
        "computing",
        "errors",
        "config",
        "model",
        "files",
        "decoding",
        "answers",
        "asked",
        "packs",
        "opening",
    },
    "retrieval": {
        "computing",
        "errors",
        "config",
        "model",
        "files",
        "decoding",
        "answers",
        "asked",
        "opening",
        "api",
    },
    "work": {
        "errors",
        "config",
        "model",
        "kernels",
        "files",
        "decoding",
        "answers",
        "asked",
        "packs",
        "opening",
        "api",
        "retrieval",
        "",
    },
    "porting": {
        "errors",
        "config",
        "model",
        "kernels",
        "files",
        "decoding",
        "opening",
        "api",
        "",
    },
    "cli": {
        "errors",
        "config",
        "kernels",
        "files",
        "decoding",
        "answers",
        "opening",
        "api",
        "retrieval",
        "work",
        "porting",
        "",
    },
    "__main__": {"cli"},
    "": {"errors", "api", "retrieval"},
}
LIBRARIES = {
    "errors": set(),
    "computing": set(),
    "config": set(),
    "model": {"numpy"},
    "kernels": {"numpy", "numba", "llvmlite"},
    "files": {"numpy", "PIL", "safetensors", "sentencepiece", "huggingface_hub"},
    "decoding": {"numpy"},
    "answers": {"numpy", "PIL"},
    "asked": {"numpy", "PIL"},
    "packs": set(),
    "opening": set(),
    "api": {"numpy"},
    "retrieval": {"numpy"},
    "work": {"numpy", "PIL", "ray", "pyarrow"},
    "porting": {"numpy", "PIL", "safetensors"},
    "cli": {"click"},
    "__main__": set(),
    "": set(),
}


def imported(path: Path) -> list[str]:
    """Every module that a file imports, wherever in the file, in full."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part_of(path: Path) -> str:
    """The room a file belongs to: its folder, its name, or "" for the package itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_up_the_table_only(path: Path) -> None:
    part = part_of(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "npvlm":
            allowed = MAY_IMPORT[part] | {part}
            inside = rest.split(".")[0]
            known = (PACKAGE / inside).exists() or (PACKAGE / f"{inside}.py").exists()
            target = inside if known else ""
            fits = any(rest == a or rest.startswith(f"{a}.") for a in allowed if a)
            assert fits or target in allowed, f"{part} may not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in LIBRARIES[part], f"{part} may not import {top}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_open_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} opens with no sentence"


def test_the_command_line_is_parsed_before_numpy_is_imported() -> None:
    code = (
        "import sys, npvlm.cli.commands; sys.exit('numpy' in sys.modules or 'PIL' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_model_functions_take_ops_and_tap_by_name_and_without_a_default() -> None:
    for path in [*PACKAGE.glob("model/*.py"), *PACKAGE.glob("decoding/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            plain = [a.arg for a in node.args.args]
            if path.name != "tap.py":
                assert not {"ops", "tap"} & set(plain), f"{path}: {node.name}"
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                if argument.arg in ("ops", "tap"):
                    assert default is None, f"{path}: {node.name} has a default {argument.arg}"
