"""Heun with churn: Karras et al. 2022, algorithm 2."""

import math
from collections.abc import Callable

from torch import Tensor

from duotone.data.refusal import at_least
from duotone.engine.sampling.samplers.heun import heun_step


def stochastic_heun(
    denoise: Callable,
    x_NCHW: Tensor,
    sigmas: Tensor,
    *,
    noise: Callable,
    churn: float = math.inf,
    churn_from: float = 0.0,
    churn_to: float = math.inf,
    noise_scale: float = 1.0,
    on_step: Callable | None = None,
    **_: object,
) -> Tensor:
    """Where churn_from <= sigma <= churn_to, adds noise up to (1 + gamma) sigma; from there it takes Heun's step.

    gamma = min(churn / steps, sqrt(2) - 1), by default its maximum. `noise(i)` gives the fresh normal noise of step i. Raises
    Refused on a churn below 0, which would give the denoiser a sigma below the actual noise level.
    """
    at_least("churn", churn, 0)
    most = math.sqrt(2) - 1
    steps = len(sigmas) - 1
    for i, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        churned = churn_from <= sigma <= churn_to and math.isfinite(sigma)
        gamma = min(churn / steps, most) if churned else 0.0
        raised = sigma * (1 + gamma)
        if gamma > 0:
            x_NCHW = x_NCHW + (raised**2 - sigma**2) ** 0.5 * noise_scale * noise(i)
        x_NCHW, denoised = heun_step(denoise, x_NCHW, raised, following)
        if on_step:
            on_step(i, x_NCHW, denoised)
    return x_NCHW
