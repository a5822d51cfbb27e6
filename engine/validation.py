"""Losses on held-out images during a run: of the EMA weights, always on the same images and draws, so that they differ by the weights alone."""

import statistics
from dataclasses import dataclass

from duotone.data.refusal import at_least
from duotone.data.shards import Shards
from duotone.engine.evaluate.images import Images, read_images


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How often the loss on held-out images is measured, and on what."""

    every: int = 0
    """Images between measurements, which need data.held_out, and one at the end; 0 = never."""
    images: int = 256
    """Held-out images measured, the same every time."""
    levels: int = 8
    """Equally likely noise levels, at each of which they are measured."""

    def check(self) -> None:
        at_least("validation.every", self.every, 0)
        at_least("validation.images", self.images, 2)
        at_least("validation.levels", self.levels, 1)


def held_out(config: Validation, shards: Shards) -> Images | None:
    """The images of every measurement; raises Refused where the data holds none out."""
    return read_images(shards, config.images, "validation set", "held out") if config.every else None


def measured(config: Validation, model, images: Images) -> dict:
    """A row of validation.jsonl: the mean loss, its levels with their 95 % intervals over images, and the mean of each class."""
    from duotone.engine.evaluate.loss_table import WHOLE, loss_table  # which knows models, and so recipes

    cells = loss_table(model, images, levels=config.levels)
    levels = [cell for cell in cells if cell.name == WHOLE]
    names = dict.fromkeys(cell.name for cell in cells if cell.name != WHOLE)
    return {
        "images": model.images,
        "loss": statistics.mean(cell.loss for cell in levels),
        "levels": [{name: getattr(cell, name) for name in ("sigma", "loss", "low", "high")} for cell in levels],
        "classes": {name: statistics.mean(cell.loss for cell in cells if cell.name == name) for name in names},
    }
