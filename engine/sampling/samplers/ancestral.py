"""Ancestral sampling: each step removes noise past the next level and adds fresh noise back; DDPM's own sampler."""

from collections.abc import Callable

from torch import Tensor


def ancestral(
    denoise: Callable, x_NCHW: Tensor, sigmas: Tensor, *, noise: Callable, on_step: Callable | None = None, **_: object
) -> Tensor:
    """Samples the posterior q(x_next | x, x0) with x0 = D(x): Ho et al. 2020, equations 6 and 7, in x0 + sigma noise.

    `noise(i)` gives the fresh normal noise of step i, shaped like x_NCHW.
    """
    for i, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        denoised = denoise(x_NCHW, sigma)
        ratio = (following / sigma) ** 2
        x_NCHW = denoised + ratio * (x_NCHW - denoised)
        if following > 0:
            x_NCHW = x_NCHW + following * (1 - ratio) ** 0.5 * noise(i)
        if on_step:
            on_step(i, x_NCHW, denoised)
    return x_NCHW
