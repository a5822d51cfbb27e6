"""Duotone's engine: what a recipe, a notebook or a service needs."""

from duotone.engine.artifact import Model, load
from duotone.engine.recipe import Recipe, main
from duotone.engine.sample import sample
from duotone.engine.train import train

__all__ = ["Model", "Recipe", "load", "main", "sample", "train"]
