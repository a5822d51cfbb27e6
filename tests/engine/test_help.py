"""--help: it says what every flag of every command does, and its pager may end before the text does."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from duotone.engine import cli
from duotone.engine.recipe import Recipe

ROOT = Path(__file__).parents[2]
COMMANDS = [Recipe]
COMMANDS += [getattr(importlib.import_module(module), name) for module, name, _ in cli.PREPARE.values()]
COMMANDS += [
    getattr(importlib.import_module(f"duotone.engine.commands.{file}"), name)
    for file, (name, _) in cli.COMMANDS.items()
]


def groups_in(hint) -> Iterator[type]:
    """The dataclasses that a field may hold: each is a group of flags."""
    if is_dataclass(hint):
        yield hint
    for inner in get_args(hint):
        yield from groups_in(inner)


def reached_from(cls: type, found: dict) -> dict:
    """A dataclass and all that its fields may hold, in order."""
    if cls not in found:
        found[cls] = None
        for hint in get_type_hints(cls).values():
            for group in groups_in(hint):
                reached_from(group, found)
    return found


def without_help(cls: type) -> list[str]:
    """Fields, including inherited ones, that are neither groups of flags nor have a docstring below them."""
    silent, hints = [], get_type_hints(cls)
    for owner in (base for base in cls.__mro__ if is_dataclass(base)):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for line, below in zip(body, [*body[1:], None]):
            told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(line, ast.AnnAssign) and not told and not any(groups_in(hints[line.target.id])):
                silent.append(line.target.id)
    return silent


@pytest.mark.parametrize(
    "cls", {c: None for command in COMMANDS for c in reached_from(command, {})}, ids=lambda c: c.__name__
)
def test_every_flag_says_what_it_does(cls):
    assert not without_help(cls)


def unheard(*words: str) -> subprocess.CompletedProcess:
    """Runs a Python whose standard output goes to a pager that has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run([sys.executable, *words], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    finally:
        os.close(writing)


@pytest.mark.parametrize("words", [["recipes/mnist_concat.py"], ["-m", "duotone.engine.cli", "sample"]], ids=" ".join)
def test_help_into_a_pager_that_has_ended_is_no_traceback(words):
    done = unheard(*words, "--help")
    assert done.returncode == 1 and not done.stderr


def test_a_line_that_nobody_hears_ends_nothing():
    """A run prints its first lines before it has a log."""
    done = unheard(
        "-c", "from duotone.engine.log import say; import sys; say('a line'); print('goes on', file=sys.stderr)"
    )
    assert done.stderr.splitlines()[0] == "goes on"
