"""CFG++: Chung et al. 2024, "Manifold-constrained classifier-free guidance".

N images, C channels, H x W pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from duotone.data.refusal import Refused
from duotone.engine.sampling.samplers.euler import euler


@dataclass(frozen=True, kw_only=True)
class CfgPlusPlus:
    """Denoises with guidance, renoises with the unconditional noise; scales lie in [0, 1]. For Euler steps (DDIM) only."""

    def begin(self, sigmas: Tensor, solver: Callable, scales: Sequence[float]) -> "CfgPlusPlusRun":
        if solver is not euler:
            raise Refused(
                f"CFG++ is a rule for Euler steps, and the sampler is {getattr(solver, '__name__', solver)}: set sampler to euler"
            )
        if min(scales) < 0 or max(scales) > 1:
            raise Refused("CFG++ takes guidance between 0 and 1 (0.6 is comparable to 7.5 in plain guidance)")
        return CfgPlusPlusRun(sigmas)


class CfgPlusPlusRun:
    """Knows the noise level after each step, so that a plain Euler step with another scale gives the paper's step.

    The paper's step is x' = D_g + s' (x - D_u) / s with D_g = D_u + scale (D_c - D_u), algorithm 2 in x0 + sigma noise; Euler's
    is x' = D + s' (x - D) / s. They agree for D = D_u + scale / (1 - s' / s) (D_c - D_u).
    """

    def __init__(self, sigmas: Tensor):
        self.following = dict(zip(sigmas[:-1].tolist(), sigmas[1:].tolist()))

    def __call__(self, conditional_NCHW: Tensor, unconditional_NCHW: Tensor, scale_N: Tensor, sigma: float) -> Tensor:
        left = 1.0 if math.isinf(sigma) else 1 - self.following[sigma] / sigma
        share_N111 = (scale_N / left)[:, None, None, None]
        return unconditional_NCHW + share_N111 * (conditional_NCHW - unconditional_NCHW)
