"""Clipping of the denoised image to where pixels lie: Ho et al. 2020's own sampler, and diffusers' `clip_sample`."""

from collections.abc import Callable

from torch import Tensor


def clipped(solver: Callable) -> Callable:
    """`solver` with D(x; sigma) kept within [-1, 1] at every evaluation, after guidance.

    Where a network predicts the noise, D = x - sigma epsilon multiplies its error by sigma, 20,000 at the end of a cosine schedule:
    without this the first steps leave the range of any image and the rest cannot mend it. What changes D further, as
    epsilon_scaled does, puts it through `keep` once more.
    """

    def within(denoise: Callable, x_NCHW: Tensor, sigmas: Tensor, **rest: object) -> Tensor:
        return solver(lambda x_NCHW, sigma: clip(denoise(x_NCHW, sigma)), x_NCHW, sigmas, keep=clip, **rest)

    within.__name__ = f"clipped({getattr(solver, '__name__', solver)})"
    return within


def clip(denoised_NCHW: Tensor) -> Tensor:
    """The image within [-1, 1]."""
    return denoised_NCHW.clamp(-1, 1)
