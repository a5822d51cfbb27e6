"""What pictures a run draws of itself: drawn by drawing.py."""

import math
from dataclasses import dataclass

from duotone.data.refusal import Refused, at_least
from duotone.engine.conditioning.attributes import attribute_row, states_in
from duotone.engine.conditioning.base import Facts
from duotone.engine.objectives.base import Objective
from duotone.engine.sampling.samplers.named import solver_named


@dataclass(frozen=True, kw_only=True)
class Previews:
    """What pictures a run draws of itself, and how."""

    every: int = 256_000
    """Images between previews; 0 = only at the end."""
    prompts: tuple[str, ...] = ()
    """For text: what to draw; by default captions of the data."""
    attributes: tuple[str, ...] = ()
    """For attributes: what to draw, each row's with commas between them, as "Smiling,Male=0"; by default one attribute a row."""
    columns: int = 8
    """Pictures per prompt, class or set of attributes."""
    rows: int = 8
    """Most prompts or sets of attributes drawn; of classes alone at least ten."""
    sheets: bool = False
    """At the end also a sheet of rows x columns pictures for each class."""
    steps: int = 18
    """Sampling steps."""
    guidance: float = 2.0
    """Guidance scale (1 where the conditions are never dropped in training)."""
    sampler: str = "heun"
    """euler, heun, dpmpp_2m, ancestral or stochastic_heun."""
    strips: bool = True
    """Also draw each row's first picture as the network sees it at every step: a conditional strip, an unconditional one where that
    was trained, and a GIF."""
    noisy: bool = False
    """Strips and GIF show the pictures as they stand, noise and all, instead."""

    def check(self, objective: Objective) -> None:
        """Refuses what no picture could be drawn with, long before the first is due."""
        at_least("preview.every", self.every, 0)
        for name in ("columns", "rows", "steps"):
            at_least(f"preview.{name}", getattr(self, name), 1)
        if not math.isfinite(self.guidance):
            raise Refused(f"preview.guidance = {self.guidance}: give a finite number")
        try:
            solver_named(self.sampler)
            objective.falling_sigmas(self.steps)
        except Refused as refusal:
            raise Refused(f"preview: {refusal}") from None

    def check_names(self, facts: Facts) -> None:
        """Refuses attributes that the data does not have."""
        try:
            for text in self.attributes if facts.attributes else ():
                attribute_row(states_in(text), facts.attributes)
        except Refused as refusal:
            raise Refused(f"preview.attributes: {refusal}") from None
