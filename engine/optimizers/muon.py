"""Muon: matrices move along their orthogonalised momentum, everything else by AdamW, with one learning rate for both.

Jordan et al. 2024 (the method and its polynomial), Liu et al. 2025, equation 4 (the scale that makes a step as long as AdamW's).
K matrices of one shape, M x N; P parameters of one rank's shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from duotone.data.refusal import at_least, share
from duotone.engine.model.blocks import EmbeddingLinear, EndConv
from duotone.engine.optimizers.adamw import AdamWEma
from duotone.engine.optimizers.base import OptimizerConfig, parameter_groups
from duotone.engine.optimizers.matrices import Matrices

SCALE = 0.2
"""Approximate root mean square of AdamW's steps at a learning rate of 1."""


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerConfig):
    """Jordan et al. 2024 for layers over pixels and tokens; AdamW for first and last layer, time and condition layers, and vectors."""

    momentum: float = 0.95
    """Nesterov momentum of the matrices' gradients."""
    iterations: int = 5
    """Iterations of the polynomial that orthogonalises a matrix."""

    largest_stage = 2

    def check(self) -> None:
        super().check()
        share("optimizer.momentum", self.momentum, below_one=True)
        at_least("optimizer.iterations", self.iterations, 1)

    def build(self, network: nn.Module) -> "MuonEma":
        inner = list(matrices_of(network))
        along = {"weight_decay": self.weight_decay, "momentum": self.momentum, "iterations": self.iterations}
        groups = [{"params": inner, **along}] if inner else []
        taken = {id(p) for p in inner}
        others = [p for p in network.parameters() if id(p) not in taken]
        return MuonEma([*groups, *parameter_groups(others, self.weight_decay)], self)

    def state_elements(self, network: nn.Module) -> int:
        return super().state_elements(network) - sum(p.numel() for p in matrices_of(network))


def matrices_of(network: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of trained convolutions and linear layers, except the first and last layer and those over time and condition.

    A batch's gradient of the latter lies in a few directions (a noise level, a class); orthogonalised, it would take steps
    of the same length in all other directions, which are noise.
    """
    for module in network.modules():
        inner = isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, EndConv | EmbeddingLinear)
        if inner and module.weight.requires_grad:
            yield module.weight


class MuonEma(AdamWEma):
    """Updates groups that have a momentum by Muon, which keeps no second moment, and the others by AdamW."""

    def kept_of(self, shard: Tensor) -> tuple[str, ...]:
        groups = (group for group in self.param_groups if any(p is shard for p in group["params"]))
        return ("exp_avg",) if any("momentum" in group for group in groups) else super().kept_of(shard)

    def move(self, shard: Tensor, grad: Tensor, group: dict, *, step, matrices, **same) -> None:
        if "momentum" not in group:
            super().move(shard, grad, group, step=step, matrices=matrices, **same)
            return
        state = self.state_of(shard)
        along = {name: group[name] for name in ("weight_decay", "momentum", "iterations")}
        muon_ema_(shard.data, grad, state["exp_avg"], [state["ema"]], matrices(), **along, **same)


def orthogonalised(x_KMN: Tensor, iterations: int) -> Tensor:
    """The matrices with singular values near 1 and the same singular vectors: iterates x <- a x + b (x x') x + c (x x')^2 x.

    In bf16 on a GPU, as in the authors' code; a matrix of zeros stays zero.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x_KMN.shape[1] > x_KMN.shape[2]
    x = x_KMN.mT if tall else x_KMN
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(x_KMN.dtype)


def step_of(x_KMN: Tensor, iterations: int) -> Tensor:
    """The step along momentum x, about as long as AdamW's at the same learning rate."""
    return orthogonalised(x_KMN, iterations) * (SCALE * max(x_KMN.shape[1:]) ** 0.5)


@torch.no_grad()
def muon_ema_(
    master_P: Tensor,
    grad_P: Tensor,
    average_P: Tensor,
    emas: list[Tensor],
    matrices: Matrices,
    *,
    lr: Tensor,
    momentum: float,
    iterations: int,
    weight_decay: float,
    grad_scale: Tensor,
    ema_decays: list[Tensor],
    weights_out: Tensor,
) -> None:
    """One step of a shard, in place; a `grad_scale` of NaN skips it, without waiting for the device."""
    taken, exact = grad_scale.isfinite(), master_P.dtype
    grad_P = torch.where(taken, grad_P.to(exact) * grad_scale.to(exact), 0)
    average_P.lerp_(grad_P, ((1 - momentum) * taken).to(exact))
    step_P = matrices.each(grad_P.lerp(average_P, momentum), partial(step_of, iterations=iterations))
    rate = (lr * taken).to(exact)
    master_P.sub_(rate * (step_P + weight_decay * master_P))
    for ema_P, decay in zip(emas, ema_decays, strict=True):
        ema_P.lerp_(master_P, ((1 - decay) * taken).to(exact))
    weights_out.copy_(master_P)
