"""How the samples of an evaluation are drawn."""

import math
from dataclasses import dataclass

from duotone.data.refusal import Refused
from duotone.engine.sampling.guiding.named import rule_named

EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Guidance, solver and seed, as `duotone sample` names them."""

    guidance: float = 2.0
    """Guidance scale: 1 = none."""
    interval: tuple[float, float] = EVERYWHERE
    """Noise levels sigma between which guidance applies; a step outside costs one forward pass instead of two."""
    rescale: float = 0.0
    """How far, 0 to 1, the contrast of the guided prediction is pulled back to that of the conditional one."""
    rule: str = "plain"
    """How guidance combines the predictions: plain, apg (adaptive projected guidance) or cfg++ (scales of 0 to 1, euler)."""
    steps: int = 18
    """Sampling steps."""
    sampler: str = "heun"
    """euler, heun, dpmpp_2m, ancestral or stochastic_heun."""
    spacing: str | None = None
    """How noise levels are placed: karras or log-linear; for DDPM also trailing, leading, linspace; for flow trailing, linspace."""
    clip: bool | None = None
    """Limit every step's denoised image to the range of pixels; on by default for DDPM."""
    seed: int = 1
    """Seed of the pictures' noise and of the losses' draws."""

    def refuse_without_effect(self) -> None:
        """Raises Refused if guidance is given an interval or a rescaling, but there is none."""
        if self.rule == "plain" and self.guidance == 1 and (self.rescale or self.interval != EVERYWHERE):
            raise Refused("--interval and --rescale have no effect at guidance 1: give more, or leave them out")

    def for_sample(self) -> dict:
        """Keyword arguments of sample(); raises Refused on an unknown rule."""
        names = ("guidance", "interval", "rescale", "steps", "sampler", "spacing", "clip", "seed")
        return {name: getattr(self, name) for name in names} | {"rule": rule_named(self.rule)}

    def to_json(self) -> dict:
        """As plain JSON, in which an interval's end at infinity is null."""
        interval = [None if math.isinf(end) else end for end in self.interval]
        names = ("guidance", "rescale", "rule", "steps", "sampler", "spacing", "clip", "seed")
        return {name: getattr(self, name) for name in names} | {"interval": interval}
