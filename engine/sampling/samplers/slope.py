"""The direction of the probability-flow ODE, along which every deterministic step moves."""

import math

from torch import Tensor


def slope(x_NCHW: Tensor, denoised_NCHW: Tensor, sigma: float) -> Tensor:
    """dx / dsigma = (x - D) / sigma: Karras et al. 2022, algorithm 1, line 4. At sigma = infinity it is x, the noise itself."""
    return x_NCHW if math.isinf(sigma) else (x_NCHW - denoised_NCHW) / sigma
