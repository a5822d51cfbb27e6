"""Every recipe from start to export: its small network on the embedded data, and its own on real images, for two steps."""

import ast
import gzip
import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from duotone.engine import cli, memory
from duotone.engine.command_line import parse
from duotone.engine.commands.evaluate import Evaluate
from duotone.engine.recipe import Recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FASHION = Path("/usr/share/datasets/fashion-mnist")
SHORT = [
    "--checkpoint.every",
    "0",
    "--preview.every",
    "0",
    "--preview.rows",
    "2",
    "--preview.columns",
    "1",
    "--preview.steps",
    "2",
]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Runs a recipe's file as `python recipes/X.py` does, but in this process; returns the run's folder."""

    def start(recipe: Path, *flags: str) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(recipe), "--out", "run", "--speed.threads", "1", *SHORT, *flags])
        runpy.run_path(str(recipe), run_name="__main__")
        return tmp_path / "run"

    return start


def check(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows and all(np.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
    assert (folder / "ema.safetensors").exists() and list((folder / "previews").glob("*.png"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_at_most_sixty_lines(recipe):
    assert len(recipe.read_text().splitlines()) <= 60


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_its_arithmetic_can_be_counted(recipe):
    """`duotone estimate` needs this first; a forward pass takes at least two operations per weight."""
    found = runpy.run_path(str(recipe))["recipe"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in found.model.build().parameters())
    assert memory.flops_of(found.model, found.data.size) > 2 * parameters


def commands_of(recipe: Path) -> list[list[str]]:
    """The commands of its docstring, as words."""
    lines = ast.get_docstring(ast.parse(recipe.read_text())).splitlines()
    return [shlex.split(line) for line in lines if line.startswith(("duotone ", "deepspeed ", "python "))]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_the_commands_of_its_docstring_fit_together(recipe):
    """Their flags exist and go together, and they name no shards that no earlier command has made."""
    made, found = set(), runpy.run_path(str(recipe))["recipe"]
    for program, *words in commands_of(recipe):
        flags = words[2:] if program == "duotone" else words[1:]
        if words[0] == "prepare":
            module, cls, _ = cli.PREPARE[words[1]]
            made.add(str(parse(getattr(importlib.import_module(module), cls), flags).out))
        elif program == "deepspeed":
            assert words[0] == f"recipes/{recipe.name}"
            parse(Recipe, flags, default=found).check()
        elif words[0] == "evaluate":
            assert words[1] == f"runs/{found.name}"
            parse(Evaluate, flags)
        assert {word for word in words if word.startswith("shards/")} <= made
    assert made


def test_no_two_recipes_write_other_shards_to_one_folder():
    said: dict[str, set[tuple]] = {}
    for words in (words for recipe in RECIPES for words in commands_of(recipe) if words[1] == "prepare"):
        said.setdefault(words[words.index("--out") + 1], set()).add(tuple(words))
    assert [folder for folder, ways in said.items() if len(ways) > 1] == []


def one_of_each_small_network() -> list[Path]:
    """One recipe for each small network; the text network is the demo's, which other tests run."""
    found = {re.search(r"import (small_\w+)", p.read_text()).group(1): p for p in reversed(RECIPES)}
    return [p for small, p in sorted(found.items()) if small != "small_text"]


@pytest.mark.parametrize("recipe", one_of_each_small_network(), ids=lambda p: p.stem)
def test_the_small_network_runs_on_the_embedded_data(recipe, started, tmp_path):
    folder = started(recipe, "--images", "32", "--preview.every", "16")
    check(folder)
    films = sorted(path.name for path in (folder / "previews").glob("*.gif"))
    assert films == ["images-000000000016.gif", "images-000000000032.gif", "training.gif"]
    with Image.open(folder / "previews" / "training.gif") as film:
        assert film.n_frames == 2
    card = (folder / "MODEL_CARD.md").read_text()
    assert "trained on | 32 images" in card and str(tmp_path) not in card


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """A few hundred real photographs in MNIST's format, as shards."""
    if not FASHION.exists():
        pytest.skip("Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    from duotone.data.prepare.idx import PrepareIdx

    out = tmp_path_factory.mktemp("clothes") / "shards"
    images, labels = (FASHION / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    PrepareIdx(images=images, labels=labels, names="fashion-mnist", out=out, limit=300).run()
    with gzip.open(images) as file:
        assert file.read(4) == b"\0\0\x08\x03"
    return out


@pytest.mark.parametrize("name", ["fashion_mnist_edm", "mnist_concat", "mnist_attributes"])
def test_the_published_network_runs_on_real_images(name, clothes, started):
    flags = ["--data.shards", str(clothes), "--batch-size", "8", "--images", "16"]
    check(started(ROOT / "recipes" / f"{name}.py", *flags))


# ---------------------------------------------------------------------- from files as they are published, by its own commands


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with what the recipes' docstrings name: pieces of two real photographs, laid out as in each data set."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("published")
    photographs = load_sample_images().images
    pieces = [photographs[i % 2][10 * i : 10 * i + 218, 16 * i : 16 * i + 178] for i in range(20)]
    faces(folder, pieces)
    for i, piece in enumerate(pieces):
        inside = folder / "home" / "pictures" / ("china", "flower")[i % 2]
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(piece).save(inside / f"{i}.JPG")
    (folder / "cifar-10-batches-bin").mkdir()
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        records = [bytes([i % 10]) + piece[:32, :32].transpose(2, 0, 1).tobytes() for i, piece in enumerate(pieces)]
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(b"".join(records))
    return folder


def faces(folder: Path, pieces: list) -> None:
    """CelebA's and CelebA-HQ's lists, with two of their forty attributes."""
    for images, name in (("img_align_celeba", "{:06d}.jpg"), ("CelebA-HQ-img", "{}.jpg")):
        (folder / images).mkdir()
        names = [name.format(i) for i in range(len(pieces))]
        for one, piece in zip(names, pieces):
            Image.fromarray(piece).save(folder / images / one)
        rows = "".join(f"{one}  {(-1) ** i} {1 - 2 * (i % 3 == 0)}\n" for i, one in enumerate(names))
        listed = {"img_align_celeba": "list_attr_celeba.txt", "CelebA-HQ-img": "CelebAMask-HQ-attribute-anno.txt"}
        (folder / listed[images]).write_text(f"{len(names)}\nSmiling Male\n{rows}")
    parts = "".join(f"{i:06d}.jpg {2 * (i % 4 == 0)}\n" for i in range(len(pieces)))
    (folder / "list_eval_partition.txt").write_text(parts)


# The smallest side that keeps a network's levels.
SIDES = {"celeba_edm": "16", "celeba_hq_attributes": "32", "image_folder": "32"}
LARGE = ("celeba_hq_attributes", "cifar10_attributes", "image_folder")


@pytest.mark.parametrize(
    "name", ["celeba_edm", "cifar10_guided", *(pytest.param(n, marks=pytest.mark.long) for n in LARGE)]
)
def test_the_published_network_runs_by_the_commands_of_its_docstring(name, published, started, monkeypatch, tmp_path):
    recipe = ROOT / "recipes" / f"{name}.py"
    monkeypatch.setenv("HOME", str(published / "home"))
    monkeypatch.chdir(published)
    for program, *words in commands_of(recipe):
        if words[0] == "prepare":
            words = [str(Path(word).expanduser()) for word in words]
            cli.main([word if not word.startswith("shards/") else str(tmp_path / word) for word in words])
        elif program == "deepspeed":
            side = ["--data.size", SIDES[name]] if name in SIDES else []
            check(started(recipe, *words[1:], *side, "--batch-size", "2", "--images", "4"))
            return
