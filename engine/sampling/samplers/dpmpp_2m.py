"""DPM-Solver++(2M): Lu et al. 2022, algorithm 2, in log sigma."""

import math
from collections.abc import Callable

from torch import Tensor

from duotone.engine.sampling.samplers.slope import slope


def dpmpp_2m(
    denoise: Callable, x_NCHW: Tensor, sigmas: Tensor, *, on_step: Callable | None = None, **_: object
) -> Tensor:
    """Second order, multistep; one denoiser call per step. The first and the last step are first order."""
    before, width_before = None, 0.0
    for i, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        denoised = denoise(x_NCHW, sigma)
        target = denoised
        width = math.log(sigma / following) if following > 0 else math.inf
        if before is not None and following > 0:
            share = width / (2 * width_before)
            target = (1 + share) * denoised - share * before
        x_NCHW = target + following * slope(x_NCHW, target, sigma)
        before, width_before = denoised, width
        if on_step:
            on_step(i, x_NCHW, denoised)
    return x_NCHW
