"""What all optimizers share: settings, a learning rate that is a function of the images seen, and parameter groups."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from duotone.data.refusal import Refused, above, at_least


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of every optimizer: the schedule, and AdamW's, which also serve optimizers that use AdamW for some parameters."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's running averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the second moment, by which AdamW divides."""
    weight_decay: float = 1e-4
    """Weight decay of matrices and convolutions; biases and norm weights have none."""
    clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    warmup: int = 10_000
    """Images over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """What follows the warm-up: constant, or half a cosine down to 0 at the end of the run."""

    largest_stage = 3
    """The highest ZeRO stage under which the optimizer works."""

    def check(self) -> None:
        for name in ("lr", "eps"):
            above(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("weight_decay", "clip", "warmup"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise Refused(f"optimizer.betas = {self.betas}: each must lie in [0, 1)")

    def lr_at(self, images: int, total: int) -> float:
        """Learning rate of the step that begins at `images` of `total`."""
        if images < self.warmup:
            return self.lr * images / self.warmup
        if self.schedule == "constant":
            return self.lr
        progress = (images - self.warmup) / max(1, total - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def state_elements(self, network: nn.Module) -> int:
        """Number of fp32 elements that all ranks together keep: weights, both moments, EMA."""
        return 4 * sum(p.numel() for p in network.parameters())


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """The trained parameters in two groups: with weight decay (matrices, convolutions) and without (vectors)."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
