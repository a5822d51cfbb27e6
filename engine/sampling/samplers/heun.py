"""Heun's second-order steps: Karras et al. 2022, algorithm 1."""

from collections.abc import Callable

from torch import Tensor

from duotone.engine.sampling.samplers.slope import slope

FAR = 500.0
"""Noise level from which the image in x is negligible. Steps from here or above are Euler steps, as from infinity: in a step from
20,000 to 10, which a cosine schedule has, averaging both slopes would multiply the error of the second by 1,000."""


def heun(denoise: Callable, x_NCHW: Tensor, sigmas: Tensor, *, on_step: Callable | None = None, **_: object) -> Tensor:
    """Second order; two denoiser calls per step, except for the last and those from FAR or above, which are Euler steps."""
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
    if following > 0 and sigma < FAR:
        there = slope(x_next, denoise(x_next, following), following)
        x_next = x_NCHW + (following - sigma) * (here + there) / 2
    return x_next, denoised
