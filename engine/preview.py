"""The settings of a run's previews; drawing.py draws them."""

import math
from dataclasses import dataclass

from duotone.data.refusal import Refused, at_least
from duotone.engine.conditioning.attributes import attribute_row, states_in
from duotone.engine.conditioning.base import Facts
from duotone.engine.objectives.base import Objective
from duotone.engine.sampling.samplers.named import solver_named


@dataclass(frozen=True, kw_only=True)
class Previews:
    """Which pictures a run draws as previews, and how."""

    every: int = 256_000
    """Images between previews; 0 = only at the end."""
    prompts: tuple[str, ...] = ()
    """Captions to draw, for a text model; by default captions of the data."""
    attributes: tuple[str, ...] = ()
    """Attributes to draw, one entry per row, such as "Smiling,Male=0"; by default one attribute per row."""
    columns: int = 8
    """Pictures per prompt, class or set of attributes."""
    rows: int = 8
    """The most prompts or sets of attributes drawn; for classes alone at least ten."""
    sheets: bool = False
    """At the end, also draw a sheet of rows x columns pictures for each class."""
    steps: int = 18
    """Sampling steps."""
    guidance: float = 2.0
    """Guidance scale (1 where the conditions are never dropped in training)."""
    sampler: str = "heun"
    """euler, heun, dpmpp_2m, ancestral or stochastic_heun."""
    strips: bool = True
    """Also show each row's first picture as predicted at every step: a strip with its condition, one without
    if that was trained, and a GIF."""
    noisy: bool = False
    """Show the noisy pictures of each step in strips and GIF instead."""

    def check(self, objective: Objective) -> None:
        """Raises Refused on settings with which no picture could be drawn, long before the first is due."""
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
        """Raises Refused on attributes that the data does not have."""
        try:
            for text in self.attributes if facts.attributes else ():
                attribute_row(states_in(text), facts.attributes)
        except Refused as refusal:
            raise Refused(f"preview.attributes: {refusal}") from None
