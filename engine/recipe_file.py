"""Reads a recipe from a recipe's file or a run's folder, with flags applied on top."""

from pathlib import Path

from duotone.data.refusal import Refused
from duotone.engine import run_folder
from duotone.engine.command_line import parse
from duotone.engine.own_file import import_file
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_json import from_json, refuse_unstorable


def recipe_at(path: Path, flags: list[str], name: str) -> Recipe:
    """The checked recipe of recipes/X.py or runs/X; `name` is the command as its help shows it.

    Raises Refused on a path without a recipe, and on flags that do not fit it.
    """
    recipe = parse(Recipe, flags, default=stored(path) if path.is_dir() else written(path), name=name)
    recipe.check()
    refuse_unstorable(recipe)
    return recipe


def stored(folder: Path) -> Recipe:
    if not (folder / "recipe.json").exists():
        raise Refused(f"{folder} is not a run's folder (no recipe.json): give one, or a file of recipes/")
    return from_json(run_folder.stored_recipe(folder))


def written(file: Path) -> Recipe:
    if not file.is_file():
        raise Refused(f"{file} does not exist: give a recipe's file, such as recipes/coco_clip.py, or a run's folder")
    try:
        found = vars(import_file(file)).get("recipe")
    except Exception as error:  # noqa: BLE001 - a file that may not be a recipe can raise anything
        raise Refused(f"{file} cannot be run as a recipe ({type(error).__name__}: {error})") from None
    if not isinstance(found, Recipe):
        raise Refused(f"{file} defines no `recipe = Recipe(...)`")
    return found
