"""Duotone's engine: what a recipe, a notebook or a service needs."""

from duotone.engine.artifact import Model, load
from duotone.engine.entry import main
from duotone.engine.fuse import fuse, unfuse
from duotone.engine.recipe import Recipe
from duotone.engine.sample import sample
from duotone.engine.train import train

__all__ = ["Model", "Recipe", "fuse", "load", "main", "sample", "train", "unfuse"]
