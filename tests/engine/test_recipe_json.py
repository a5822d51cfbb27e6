"""A stored recipe against the current one: still the same run under a later version, another run if a value differs."""

import json
from dataclasses import replace

from duotone.engine import recipe_json
from duotone.engine.model.unet import UNetConfig
from duotone.engine.recipe import Recipe


def stored(recipe: Recipe) -> dict:
    return json.loads(json.dumps(recipe_json.to_json(recipe)))


def test_a_field_that_came_later_had_its_default_then():
    recipe = Recipe(name="r", model=UNetConfig())
    earlier = stored(recipe)
    del earlier["model"]["down_pads_ends"], earlier["seed"]
    assert recipe_json.differences(earlier, recipe) == []
    (line,) = recipe_json.differences(earlier, replace(recipe, model=UNetConfig(down_pads_ends=True)))
    assert line == "model.down_pads_ends: False there, True here"


def test_a_field_that_this_version_lacks_is_named():
    recipe = Recipe(name="r")
    later = stored(recipe)
    later["model"]["twists"] = 3
    assert recipe_json.differences(later, recipe) == ["model.twists: 3 there, None here"]


def test_what_leaves_the_numbers_alone_does_not_count():
    recipe = Recipe(name="r")
    moved = replace(recipe, speed=replace(recipe.speed, threads=1), zero=replace(recipe.zero, stage=2))
    assert recipe_json.differences(stored(recipe), moved) == []
    assert recipe_json.differences(stored(recipe), replace(recipe, seed=5)) == ["seed: 0 there, 5 here"]
