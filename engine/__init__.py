"""Duotone's engine: what a recipe, a notebook or a service needs."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duotone.engine.artifact import Model, load
    from duotone.engine.entry import main
    from duotone.engine.fuse import fuse, unfuse
    from duotone.engine.recipe import Recipe
    from duotone.engine.recipe_json import register
    from duotone.engine.sample import sample
    from duotone.engine.train import train

__all__ = ["Model", "Recipe", "fuse", "load", "main", "register", "sample", "train", "unfuse"]

HOMES = {"Model": "artifact", "load": "artifact", "main": "entry", "unfuse": "fuse", "Recipe": "recipe"}
HOMES |= {"register": "recipe_json"}


class Engine(ModuleType):
    """Imports a public name on first use, so that a command that needs no torch does not wait seconds for it.

    A public function hides the module of the same name: `duotone.engine.sample` is the function.
    """

    def __getattribute__(self, name: str):
        if name in __all__:
            return getattr(importlib.import_module(f"{__name__}.{HOMES.get(name, name)}"), name)
        return super().__getattribute__(name)


sys.modules[__name__].__class__ = Engine
