"""Heun's second-order steps: Karras et al. 2022, algorithm 1."""

from collections.abc import Callable

from torch import Tensor


def heun(denoise: Callable, x_NCHW: Tensor, sigmas: Tensor, *, on_step: Callable | None = None, **_: object) -> Tensor:
    """Second order; two denoiser calls a step but the last, which is Euler's."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        denoised = denoise(x_NCHW, sigma)
        slope = (x_NCHW - denoised) / sigma
        x_next = x_NCHW + (following - sigma) * slope
        if following > 0:
            slope_next = (x_next - denoise(x_next, following)) / following
            x_next = x_NCHW + (following - sigma) * (slope + slope_next) / 2
        x_NCHW = x_next
        if on_step:
            on_step(i, x_NCHW, denoised)
    return x_NCHW
