"""The mutants of a file: what mutmut makes of each of its functions."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

from tests.mutants.exchanged import ROOT, Mutant

PACKAGE = ROOT / "npvlm"


class Visitor(MutationVisitor):
    """Visits decorated functions, too: mutmut leaves them out, since it would wrap them again."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        return not isinstance(node, cst.FunctionDef) and super()._skip_node_and_children(node)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file, but for those of annotations and of what is outside functions."""
    visitor = Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    module = MetadataWrapper(cst.parse_module(path.read_text())).visit(visitor)
    at = {}  # function -> (qualified name, statement of the module, its code, lines before it)
    above = sum(module.code_for_node(line).count("\n") for line in module.header)
    for node in module.body:
        code = module.code_for_node(node)
        inner = node.body.body if isinstance(node, cst.ClassDef) else [node]
        prefix = f"{node.name.value}." if isinstance(node, cst.ClassDef) else ""
        for function in inner:
            if isinstance(function, cst.FunctionDef):
                at[function] = prefix + function.name.value, node, code, above
        above += code.count("\n")
    seen = Counter[str]()
    for mutation in visitor.mutations:
        if mutation.contained_by_top_level_function not in at:
            continue
        name, node, code, above = at[mutation.contained_by_top_level_function]
        changed = module.code_for_node(
            deep_replace(node, mutation.original_node, mutation.mutated_node)
        )
        lines = difflib.unified_diff(code.splitlines(), changed.splitlines(), n=0, lineterm="")
        _, _, where, *lines = lines
        line = above + int(where.split()[1].lstrip("-").split(",")[0])
        diff = "\n".join(" ".join(text.split()) for text in lines if not text.startswith("@@"))
        seen[name + diff] += 1  # one change can be made in two places of a function
        if seen[name + diff] > 1:
            diff += f"  ({seen[name + diff]})"
        file = str(path.relative_to(PACKAGE))
        yield Mutant(file, name, line, diff, "\n" * above + changed)
