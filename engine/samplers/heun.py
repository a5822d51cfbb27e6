"""Heun's second-order steps: Karras et al. 2022, algorithm 1."""

import math
from collections.abc import Callable

from torch import Tensor

from duotone.engine.samplers.slope import slope


def heun(denoise: Callable, x_NCHW: Tensor, sigmas: Tensor, *, on_step: Callable | None = None, **_: object) -> Tensor:
    """Second order; two denoiser calls a step but the last, and one from infinite noise, which are Euler's."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        x_NCHW, denoised = heun_step(denoise, x_NCHW, sigma, following)
        if on_step:
            on_step(i, x_NCHW, denoised)
    return x_NCHW


def heun_step(denoise: Callable, x_NCHW: Tensor, sigma: float, following: float) -> tuple[Tensor, Tensor]:
    """x at the following sigma, and the denoised image at this one: lines 4 to 8."""
    denoised = denoise(x_NCHW, sigma)
    here = slope(x_NCHW, denoised, sigma)
    x_next = denoised + following * here
    if following > 0 and math.isfinite(sigma):
        there = slope(x_next, denoise(x_next, following), following)
        x_next = x_NCHW + (following - sigma) * (here + there) / 2
    return x_next, denoised
