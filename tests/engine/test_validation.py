"""Losses on held-out images during a run: when, of which weights, and the same after an interruption."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duotone.data import captioned_shapes
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine import artifact
from duotone.engine.conditioning.label import Label
from duotone.engine.evaluate.images import read_images
from duotone.engine.evaluate.loss_table import loss_table
from duotone.engine.log import Log
from duotone.engine.model.unet import UNetConfig
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews
from duotone.engine.recipe import Recipe
from duotone.engine.speed import Speed
from duotone.engine.train import train
from duotone.engine.validation import Validation


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    shards = tmp_path_factory.mktemp("data") / "shapes"
    captioned_shapes.write(shards, count=120, size=16, seed=0)
    return Recipe(
        name="validated",
        data=Shards(shards=shards, size=16, decoder="pillow", threads=1, held_out=0.3),
        conditioning=(Label(dropout=0.1),),
        model=UNetConfig(
            channels=(8, 8),
            attention=("none", "none"),
            middle="absent",
            heads=(1, 1),
            blocks=(1, 1),
            depth=(1, 1),
            groups=4,
        ),
        optimizer=AdamW(lr=1e-2, warmup=0, schedule="constant"),
        ema=Ema(half_life=16),
        batch_size=8,
        images=64,
        preview=Previews(every=0, rows=1, columns=1, steps=1, sampler="euler", strips=False),
        validation=Validation(every=16, images=20, levels=3),
        log=Log(every=1),
        speed=Speed(threads=1),
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    return train(replace(recipe, out=tmp_path_factory.mktemp("runs") / "whole"))


def rows(folder: Path, name: str = "validation") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_the_loss_is_measured_at_intervals_and_at_the_end(whole):
    found = rows(whole)
    assert [row["images"] for row in found] == [16, 32, 48, 64]
    assert found[-1]["loss"] < found[0]["loss"]
    for row in found:
        assert len(row["levels"]) == 3 and set(row["classes"]) <= set(captioned_shapes.SHAPES)
        assert all(level["low"] < level["loss"] < level["high"] for level in row["levels"])


def test_it_is_the_loss_of_the_exported_weights_on_images_that_were_held_out(recipe, whole):
    images = read_images(recipe.data, 20, "validation set", "held out")
    cells = loss_table(artifact.load(whole, device=torch.device("cpu")), images, levels=3)
    expected = [cell.loss for cell in cells if cell.name == "all"]
    assert [level["loss"] for level in rows(whole)[-1]["levels"]] == pytest.approx(expected, rel=1e-6)


def test_measuring_changes_no_step_and_survives_an_interruption(recipe, whole, tmp_path):
    """Cut after 40 images and resumed, a run has the same rows; a finished run that is started again repeats no row."""
    cut = replace(recipe, out=tmp_path / "cut")
    train(replace(cut, images=40))
    assert [row["images"] for row in rows(cut.out)] == [16, 32, 40]
    train(cut)
    assert [row for row in rows(cut.out) if row["images"] != 40] == rows(whole)
    train(cut)
    assert [row["images"] for row in rows(cut.out)] == [16, 32, 40, 48, 64]
    without = train(replace(recipe, out=tmp_path / "without", validation=Validation()))
    assert [row["loss"] for row in rows(without, "metrics")] == [row["loss"] for row in rows(whole, "metrics")]
    assert not (without / "validation.jsonl").exists()


@pytest.mark.parametrize(
    ("data", "validation", "says"),
    [
        ({"held_out": 0.0}, {}, "no image is held out"),
        ({}, {"every": 12}, "not a multiple of batch_size"),
        ({}, {"images": 0}, "validation.images = 0"),
        ({}, {"levels": 0}, "validation.levels = 0"),
        ({"held_out": 1e-9}, {}, "holds out nothing"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(recipe, data, validation, says, tmp_path):
    asked = replace(
        recipe,
        data=replace(recipe.data, **data),
        validation=replace(recipe.validation, **validation),
        out=tmp_path / "run",
    )
    with pytest.raises(Refused, match=says):
        train(asked)
    assert not asked.out.exists()
