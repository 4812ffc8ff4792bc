"""What the README says is true of the commands as they are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import npvlm
from npvlm.cli.commands import npvlm as commands

ROOT = Path(npvlm.__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRUST = (ROOT / "docs" / "trust.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]


def test_the_first_two_commands_are_one_line_each() -> None:
    assert [block.count("\n") for language, block in BLOCKS[:2] if language == "sh"] == [1, 1]
    assert SHELL[0].endswith("cli.py demo")
    assert SHELL[1].endswith("-m pytest")


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("npvlm ")])
def test_every_command_shown_is_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = commands.commands[name]
    context = command.make_context(name, arguments)
    assert context.params


def test_python_shown_in_the_readme_uses_what_there_is() -> None:
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    for method in re.findall(r"model\.(\w+)\(", code):
        assert callable(getattr(npvlm.Model, method))
    for field in re.findall(r"answer\.(\w+)", code):
        assert field in npvlm.Answer.__dataclass_fields__


def test_files_that_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_exit_codes_of_the_readme_are_those_of_the_errors() -> None:
    assert f"| {npvlm.UsageError.exit_code} | bad use" in README
    assert f"| {npvlm.NpvlmError.exit_code} | a model, a file or the machine" in README


def test_every_test_that_the_page_on_trust_names_is_there() -> None:
    named = set(re.findall(r"`(?:tests/)?(test_\w+|Test\w+)(?:\.py)?`", TRUST))
    files = list((ROOT / "tests").glob("test_*.py"))
    there = {file.stem for file in files}
    for file in files:
        there |= set(re.findall(r"^ *(?:def|class) (test_\w+|Test\w+)", file.read_text(), re.M))
    assert len(named) > 50 and named <= there
