"""The moving average of the weights. Its decay depends only on the images seen, so it needs no counter of its own."""

from dataclasses import dataclass

from duotone.data.refusal import at_least, share


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Exponential moving average of the weights, kept in fp32."""

    half_life: int = 500_000
    """Images after which a past value of the weights counts half."""
    rampup: float = 0.05
    """The half-life is at most this share of the images seen, as in StyleGAN2-ADA's and EDM's training; 0 = no ramp."""
    power: float = 0.0
    """If above 0: decay = 1 - (1 + step)^-power instead, at most max_decay."""
    max_decay: float = 0.9999
    """Largest decay of a power EMA."""

    def check(self) -> None:
        at_least("ema.half_life", self.half_life, 1)
        at_least("ema.rampup", self.rampup, 0)
        at_least("ema.power", self.power, 0)
        share("ema.max_decay", self.max_decay, below_one=True)

    def decay(self, images: int, batch: int) -> float:
        """The decay of the step that brings the run to `images`."""
        if self.power > 0:
            return min(self.max_decay, 1 - (1 + images / batch) ** -self.power)
        half_life = min(self.half_life, self.rampup * images) if self.rampup > 0 else self.half_life
        return 0.5 ** (batch / half_life)
