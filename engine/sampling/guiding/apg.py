"""Adaptive projected guidance: Sadat et al. 2024, "Eliminating oversaturation and artifacts of high guidance scales".

N images, C channels, H x W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.data.refusal import Refused, at_least, finite


@dataclass(frozen=True, kw_only=True)
class Apg:
    """Guidance that weakens its component parallel to the conditional prediction, which only raises contrast; acts on D."""

    parallel: float = 0.0
    """Factor on the component parallel to the conditional prediction (eta); 1 keeps all of it."""
    radius: float = 0.0
    """Largest norm of each image's running difference (r); 0 = no bound. The paper takes 2.5 to 15, for latents."""
    momentum: float = -0.5
    """Weight of the running sum of earlier differences (beta); below 0 it pushes away from their direction."""

    def begin(self, sigmas: Tensor, solver: Callable, scales: Sequence[float]) -> "ApgRun":
        if not -1 < self.momentum < 1:
            raise Refused(f"momentum = {self.momentum}: it must lie between -1 and 1")
        at_least("radius", self.radius, 0)
        finite("parallel", self.parallel)
        return ApgRun(self)


class ApgRun:
    """The state of one sampling run: the running difference."""

    def __init__(self, rule: Apg):
        self.rule = rule
        self.running = 0.0

    def __call__(self, conditional_NCHW: Tensor, unconditional_NCHW: Tensor, scale_N: Tensor, sigma: float) -> Tensor:
        """D = D_c + (scale - 1) (orthogonal + eta parallel): algorithm 1 of the paper."""
        self.running = conditional_NCHW - unconditional_NCHW + self.rule.momentum * self.running
        parallel_NCHW, orthogonal_NCHW = projected(bounded(self.running, self.rule.radius), conditional_NCHW)
        step_NCHW = orthogonal_NCHW + self.rule.parallel * parallel_NCHW
        return conditional_NCHW + (scale_N - 1)[:, None, None, None] * step_NCHW


def bounded(difference_NCHW: Tensor, radius: float) -> Tensor:
    """The difference, scaled down where its norm exceeds the radius."""
    if radius == 0:
        return difference_NCHW
    length_N111 = difference_NCHW.flatten(1).norm(dim=1)[:, None, None, None]
    return difference_NCHW * (radius / length_N111).clamp(max=1)


def projected(difference_NCHW: Tensor, onto_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The components of each image's difference parallel and orthogonal to another image; in float64, as the paper advises."""
    difference_NV, onto_NV = difference_NCHW.double().flatten(1), onto_NCHW.double().flatten(1)
    direction_NV = torch.nn.functional.normalize(onto_NV, dim=1)
    along_NV = (difference_NV * direction_NV).sum(1, keepdim=True) * direction_NV
    parallel_NCHW = along_NV.view(difference_NCHW.shape).to(difference_NCHW.dtype)
    return parallel_NCHW, difference_NCHW - parallel_NCHW
