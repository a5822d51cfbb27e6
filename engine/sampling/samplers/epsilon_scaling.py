"""Epsilon scaling: Ning et al. 2024, "Elucidating the Exposure Bias in Diffusion Models"."""

import math
from collections.abc import Callable

from torch import Tensor

from duotone.data.refusal import Refused


def epsilon_scaled(solver: Callable, factor: float) -> Callable:
    """`solver` with the predicted noise divided by `factor` at every evaluation: the paper's section 5, uniform schedule.

    Along a sampling trajectory x contains the network's own errors besides the noise, so the network predicts more noise than
    in training: good factors are a little above 1. Since D = x - sigma epsilon, the image becomes
    D + (1 - 1 / factor) (x - D). At sigma = infinity, where x is the noise itself, D is left as it is. `keep` (clipping.py) is
    applied after the scaling: in the reverse order, the scaling would bring the noise of a cosine schedule's first levels back
    into the clipped image a hundredfold. Raises Refused if the factor is not above 0.
    """
    if not factor > 0:
        raise Refused(f"factor = {factor}: epsilon scaling divides by it, so it must be above 0 (1 changes nothing)")

    def scaled(
        denoise: Callable, x_NCHW: Tensor, sigmas: Tensor, *, keep: Callable = lambda image: image, **rest: object
    ) -> Tensor:
        def mended(x_NCHW: Tensor, sigma: float) -> Tensor:
            denoised = denoise(x_NCHW, sigma)
            return denoised if math.isinf(sigma) else keep(denoised + (1 - 1 / factor) * (x_NCHW - denoised))

        return solver(mended, x_NCHW, sigmas, keep=keep, **rest)

    scaled.__name__ = f"epsilon_scaled({getattr(solver, '__name__', solver)}, {factor:g})"
    return scaled
