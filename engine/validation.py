"""Losses on held-out images during a run: of the EMA weights, always on the same images and draws, so that they differ by the weights alone."""

from dataclasses import dataclass

from duotone.data.refusal import at_least


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
