"""The README against the project: tables made from results, commands that parse, pictures that exist, links that lead somewhere."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from duotone.engine import cli
from duotone.engine.command_line import parse
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_file import recipe_at

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Every command of a fenced block, with continuation lines joined and trailing comments removed."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split("  #")[0].strip()
                if line.startswith(("duotone ", "deepspeed ", "python ")):
                    found.append(line)
    return found


def test_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, "bench/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target, heading in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), f"{target}#{heading}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_files_that_are_named_exist(page):
    """Except `x.py`, which stands for a file that a reader will add."""
    named = re.findall(r"`((?:engine|kernels|data|recipes|bench|tests)/[\w/]*(?:\.py)?)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists() and Path(name).stem not in ("x", "test_x")]


def test_every_room_of_the_engine_is_named():
    listed = re.findall(r"`([\w/]+(?:\.py)?)`", (ROOT / "CONTRIBUTING.md").read_text())
    rooms = [f"{p.name}/" if p.is_dir() else p.name for p in (ROOT / "engine").iterdir() if not p.name.startswith("__")]
    assert rooms and not set(rooms) - set(listed)


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_is_one_that_the_parser_takes(command):
    words = shlex.split(command)
    if words[0] in ("deepspeed", "python"):
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).exists()
        flags = words[words.index(script) + 1 :]
        if script.startswith("recipes/") and "--help" not in flags:
            module = runpy.run_path(str(ROOT / script), run_name="readme")
            small = next(value for name, value in module.items() if name.startswith("small_"))
            base = small if "--small" in flags or "--data.shards" not in flags else module["recipe"]
            parse(Recipe, [flag for flag in flags if flag != "--small"], default=base).check()
        for flag in flags if script.startswith("bench/") else ():
            assert not flag.startswith("--") or f'"{flag}"' in (ROOT / script).read_text(), f"{script} has no {flag}"
    elif words[1] == "prepare":
        module, cls, _ = cli.PREPARE[words[2]]
        assert cli.flags_of(getattr(__import__(module, fromlist=[cls]), cls), words[3:], "duotone prepare")
    else:
        if words[1] in cli.RECIPES:
            assert recipe_at(ROOT / words[2], words[3:], "duotone").name
            return
        cls = getattr(importlib.import_module(f"duotone.engine.commands.{words[1]}"), cli.COMMANDS[words[1]][0])
        assert cli.flags_of(cls, words[3:], "duotone")
