"""A mutant takes the place of its function: in this process, and in those that a test starts."""

from __future__ import annotations
import __future__

import ast
import hashlib
import importlib
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """One function with one change."""

    file: str  # below npvlm/
    function: str  # its qualified name
    line: int  # where the change begins
    diff: str  # the lines taken away and put in
    source: str  # the function or its class, changed, on the lines where it stands

    @property
    def key(self) -> str:
        """The same for the same change of the same function, wherever the function stands."""
        return f"{self.file} {self.function} {hashlib.sha256(self.diff.encode()).hexdigest()[:12]}"


def module_of(file: str) -> str:
    return "npvlm." + file.removesuffix(".py").replace("/", ".")


def loaded(file: str, function: str) -> FunctionType:
    """The function of the loaded module, whatever its decorators made of it."""
    found: Any = importlib.import_module(module_of(file))
    for part in function.split("."):
        found = vars(found)[part]
    while not isinstance(found, FunctionType) or hasattr(found, "__wrapped__"):
        wrapped = (
            getattr(found, name, None) for name in ("__wrapped__", "__func__", "fget", "func")
        )
        found = next(inner for inner in wrapped if inner)
    return found


def codes(code: CodeType) -> Iterator[CodeType]:
    """A piece of compiled code, and all that lie in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def exchange(mutant: Mutant) -> None:
    """Put the mutant's code and defaults into the function as it is loaded."""
    function = loaded(mutant.file, mutant.function)
    flags = __future__.annotations.compiler_flag
    tree = ast.parse(mutant.source)
    compiled = compile(tree, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    function.__code__ = next(c for c in codes(compiled) if c.co_qualname == mutant.function)
    name = mutant.function.rpartition(".")[2]
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)

    def value(default: ast.expr) -> Any:
        return eval(compile(ast.Expression(default), "default", "eval"), function.__globals__)

    function.__defaults__ = tuple(map(value, node.args.defaults)) or None
    named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    function.__kwdefaults__ = {a.arg: value(d) for a, d in named if d is not None} or None


def in_processes(place: Path, call: str) -> None:
    """Have every Python that is started from here on begin with a call of this module."""
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(
        f"from tests.mutants import exchanged\n\nexchanged.{call}\n"
    )
    os.environ["PYTHONPATH"] = f"{place}{os.pathsep}{ROOT}"


def exchange_in_processes(mutant: Mutant, place: Path) -> None:
    """Show a mutant to the processes that a test starts."""
    in_processes(place, f"exchange_at_import({str(place / 'mutant')!r})")
    (place / "mutant").write_bytes(pickle.dumps(mutant))


def note_in_processes(place: Path) -> Path:
    """The file in which processes note what they call, as `file function`, a line each."""
    in_processes(place, f"note_calls({str(place / 'calls')!r})")
    return place / "calls"


class AtImport(MetaPathFinder):
    """Puts a mutant's code into its function as soon as the module is there."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != module_of(self.mutant.file):
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            exchange(self.mutant)

        spec.loader.exec_module = exec_module
        return spec


def exchange_at_import(path: str) -> None:
    sys.meta_path.insert(0, AtImport(pickle.loads(Path(path).read_bytes())))


def note_calls(path: str) -> None:
    """Note each function of npvlm when it is first called; what is noted outlives a kill."""
    package = f"{ROOT / 'npvlm'}{os.sep}"
    noted: set[str] = set()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def watch(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            function = code.co_qualname.split(".<locals>")[0]
            name = f"{code.co_filename.removeprefix(package)} {function}"
            if name not in noted:
                noted.add(name)
                os.write(file, f"{name}\n".encode())

    threading.setprofile(watch)
    sys.setprofile(watch)
