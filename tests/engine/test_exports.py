"""What the docs and the model card say of exports is what the export does."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duotone.data.shards import Shards
from duotone.engine import artifact, diffusers_folder, model_card, small
from duotone.engine.artifact import Model
from duotone.engine.conditioning.base import Facts

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in (ROOT / "recipes").glob("*.py")}
FACTS = Facts(classes=("cat", "dog"), attributes=("Bald", "Male"))


def recipe_of(name: str):
    return runpy.run_path(str(RECIPES[name]), run_name="recipe")["recipe"]


def test_the_gallery_says_of_every_recipe_what_it_exports_as():
    said = [line for line in (ROOT / "docs" / "gallery.md").read_text().splitlines() if line.startswith("| `")]
    reasons = {name: diffusers_folder.why_not(recipe_of(name)) for name in sorted(RECIPES)}
    assert said == [f"| `{name}.py` | {f'no: {why}' if why else 'yes'} |" for name, why in reasons.items()]


@pytest.mark.parametrize("name", ["small_text", "small_label", "small_attributes", "small_concat", "small_plain"])
def test_what_is_said_is_what_the_export_does(name, tmp_path):
    """On the small networks, which are quickly built: written as a folder, or refused with the reason that the card gives."""
    recipe = replace(getattr(small, name), data=Shards(size=16))
    torch.manual_seed(0)
    model = Model(artifact.build(recipe, FACTS), recipe.objective, FACTS, recipe)
    why = diffusers_folder.why_not(recipe)
    assert (why is None) == (name in ("small_text", "small_label", "small_plain"))
    card = model_card.card(recipe, FACTS, 0)
    if why is None:
        diffusers_folder.export(model, tmp_path / "folder")
        assert (tmp_path / "folder" / "unet" / "config.json").exists()
        assert "| as a diffusers folder | `duotone export` |" in card
    else:
        with pytest.raises(diffusers_folder.Inexpressible, match=why):
            diffusers_folder.export(model, tmp_path / "folder")
        assert f"| as a diffusers folder | no, only as this single file: {why} |" in card
        assert list(tmp_path.iterdir()) == []
