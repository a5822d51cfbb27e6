"""Clipping of the denoised image to the range of pixels, as in Ho et al. 2020's own sampler and diffusers' `clip_sample`."""

from collections.abc import Callable

from torch import Tensor


def clipped(solver: Callable) -> Callable:
    """`solver` with D(x; sigma) clipped to [-1, 1] at every evaluation, after guidance.

    If a network predicts the noise, D = x - sigma epsilon multiplies its error by sigma, which is 20,000 at the end of a cosine
    schedule. Without clipping, the first steps leave the range of any image and later steps cannot recover. A solver that
    changes D further, such as epsilon_scaled, passes the result through `keep`.
    """

    def within(denoise: Callable, x_NCHW: Tensor, sigmas: Tensor, **rest: object) -> Tensor:
        return solver(lambda x_NCHW, sigma: clip(denoise(x_NCHW, sigma)), x_NCHW, sigmas, keep=clip, **rest)

    within.__name__ = f"clipped({getattr(solver, '__name__', solver)})"
    return within


def clip(denoised_NCHW: Tensor) -> Tensor:
    """The image clipped to [-1, 1]."""
    return denoised_NCHW.clamp(-1, 1)
