"""Euler steps on the probability-flow ODE; with DDPM's noise levels this is DDIM (Song et al. 2021)."""

from collections.abc import Callable

from torch import Tensor

from duotone.engine.sampling.samplers.slope import slope


def euler(denoise: Callable, x_NCHW: Tensor, sigmas: Tensor, *, on_step: Callable | None = None, **_: object) -> Tensor:
    """First order; one denoiser call per step. Karras et al. 2022, algorithm 1 without lines 6 to 8."""
    for i, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        denoised = denoise(x_NCHW, sigma)
        x_NCHW = denoised + following * slope(x_NCHW, denoised, sigma)
        if on_step:
            on_step(i, x_NCHW, denoised)
    return x_NCHW
