"""Held-out losses of the EMA weights during a run, always on the same images and draws, so only the weights matter."""

from dataclasses import dataclass

from duotone.data.refusal import at_least


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How often the loss on held-out images is measured, and on how many of them."""

    every: int = 0
    """Images between measurements; there is one at the end as well. Needs data.held_out; 0 = never."""
    images: int = 256
    """How many held-out images are measured, the same ones every time."""
    levels: int = 8
    """How many noise levels, equally likely in training, the loss is measured at."""

    def check(self) -> None:
        at_least("validation.every", self.every, 0)
        at_least("validation.images", self.images, 2)
        at_least("validation.levels", self.levels, 1)
