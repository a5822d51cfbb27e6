"""AdamW whose state carries the EMA of the weights, so that whatever shards the optimizer shards the EMA too.

Learning rate and EMA decay are functions of the images seen, so neither has a state of its own.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from duotone.data.refusal import Refused, above, at_least
from duotone.engine.matrices import Matrices
from duotone.kernels.adamw_ema import adamw_ema_


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Exponential moving average of the weights, kept in fp32."""

    half_life: int = 500_000
    """Images after which a weight counts half."""
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
        if not 0 <= self.max_decay < 1:
            raise Refused(f"ema.max_decay = {self.max_decay}: it must lie in [0, 1)")

    def decay(self, images: int, batch: int) -> float:
        """The decay of the step that brings the run to `images`."""
        if self.power > 0:
            return min(self.max_decay, 1 - (1 + images / batch) ** -self.power)
        half_life = min(self.half_life, self.rampup * images) if self.rampup > 0 else self.half_life
        return 0.5 ** (batch / half_life)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What optimizers share: AdamW's settings, which also those take that move some parameters otherwise, and the schedule."""

    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    """Decay of matrices and convolutions; biases and norm weights have none."""
    clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    warmup: int = 10_000
    """Images over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """What follows the warm-up: constant, or half a cosine down to 0 at the end of the run."""

    largest_stage = 3
    """Of ZeRO, at which it can step."""

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
        """Numbers in fp32 that all ranks together keep: weights, both moments, EMA."""
        return 4 * sum(p.numel() for p in network.parameters())


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """Loshchilov and Hutter 2019; biases and norms are not decayed."""

    def build(self, network: nn.Module) -> "AdamWEma":
        return AdamWEma(parameter_groups(network.parameters(), self.weight_decay), self)


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """The trained ones in two groups: decayed (matrices, convolutions) and not (vectors)."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class AdamWEma(torch.optim.Optimizer):
    """AdamW on the flat shards that ZeRO hands out, with `ema` beside exp_avg and exp_avg_sq in the state."""

    STATE = ("exp_avg", "exp_avg_sq", "ema")
    """What is kept beside the weights, in checkpoints too."""

    def __init__(self, groups: list[dict], config: OptimizerConfig):
        super().__init__(groups, {"lr": config.lr, "betas": config.betas, "eps": config.eps, "ema_decay": 0.0})

    def set(self, *, lr: float, ema_decay: float) -> None:
        """The learning rate and EMA decay of the coming step."""
        for group in self.param_groups:
            group["lr"], group["ema_decay"] = lr, ema_decay

    def state_of(self, shard: torch.Tensor) -> dict:
        """The state of one shard: zeros, but for the EMA, which begins as the weights."""
        state = self.state[shard]
        if not state:
            state["step"] = 0
            for name in self.kept_of(shard):
                state[name] = torch.zeros_like(shard, requires_grad=False)
            state["ema"] = shard.detach().clone()
        return state

    def kept_of(self, shard: torch.Tensor) -> tuple[str, ...]:
        """Which of STATE one shard has, beside the EMA."""
        return tuple(name for name in self.STATE if name != "ema")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for shard in group["params"]:
                if shard.grad is not None:
                    state = self.state_of(shard)
                    state["step"] += 1
                    rates = {"lr": group["lr"], "ema_decays": [group["ema_decay"]]}
                    self.move(shard, shard.grad, group, step=state["step"], **rates)

    def move(
        self,
        shard: torch.Tensor,
        grad: torch.Tensor,
        group: dict,
        *,
        step: int | torch.Tensor,
        lr: float | torch.Tensor,
        ema_decays: list,
        grad_scale: float | torch.Tensor = 1.0,
        weights_out: torch.Tensor | None = None,
        matrices: Callable[[], Matrices] | None = None,
    ) -> None:
        """One step of one shard with its EMA, in place: what another optimizer writes anew, and all that it has to.

        `step` counts from 1. Under ZeRO 1 and 2 (engine/update.py) numbers are tensors on the device, a `grad_scale` of NaN skips
        the step, `weights_out` is the network's own copy of the shard, and `matrices()` tells how matrices lie in it.
        """
        state = self.state_of(shard)
        adamw_ema_(
            *(array.view(-1) for array in (shard.data, grad, state["exp_avg"], state["exp_avg_sq"])),
            [state["ema"].view(-1)],
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            grad_scale=grad_scale,
            ema_decays=ema_decays,
            weights_out=weights_out,
        )
