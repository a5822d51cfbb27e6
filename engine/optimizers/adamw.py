"""AdamW whose state includes the EMA of the weights, so that whatever shards the optimizer shards the EMA too."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from duotone.engine.optimizers.base import OptimizerConfig, parameter_groups
from duotone.engine.optimizers.matrices import Matrices
from duotone.kernels.adamw_ema import adamw_ema_


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """Loshchilov and Hutter 2019; biases and norms are not decayed."""

    def build(self, network: nn.Module) -> "AdamWEma":
        return AdamWEma(parameter_groups(network.parameters(), self.weight_decay), self)


class AdamWEma(torch.optim.Optimizer):
    """AdamW on the flat shards that ZeRO hands out, with `ema` beside exp_avg and exp_avg_sq in the state."""

    STATE = ("exp_avg", "exp_avg_sq", "ema")
    """Names of the state kept for each shard, also in checkpoints."""

    def __init__(self, groups: list[dict], config: OptimizerConfig):
        super().__init__(groups, {"lr": config.lr, "betas": config.betas, "eps": config.eps, "ema_decay": 0.0})

    def set(self, *, lr: float, ema_decay: float) -> None:
        """Sets the learning rate and EMA decay of the next step."""
        for group in self.param_groups:
            group["lr"], group["ema_decay"] = lr, ema_decay

    def state_of(self, shard: torch.Tensor) -> dict:
        """The state of one shard; at first all zeros, except the EMA, which starts as a copy of the weights."""
        state = self.state[shard]
        if not state:
            state["step"] = 0
            for name in self.kept_of(shard):
                state[name] = torch.zeros_like(shard, requires_grad=False)
            state["ema"] = shard.detach().clone()
        return state

    def kept_of(self, shard: torch.Tensor) -> tuple[str, ...]:
        """Which of the names in STATE one shard has, besides the EMA."""
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
        """One step of one shard and its EMA, in place. Another optimizer needs to override only this.

        `step` counts from 1. Under ZeRO 1 and 2 (engine/distributed/update.py) the numbers are tensors on the device, a
        `grad_scale` of NaN skips the step, `weights_out` is the network's own copy of the shard, and `matrices()` gives the
        matrices of which the shard holds a part.
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
