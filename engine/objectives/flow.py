"""Rectified flow: Liu et al. 2023; times drawn as in Esser et al. 2024.

x_t = (1 - t) x0 + t noise is x0 + sigma noise scaled by 1 - t, with sigma = t / (1 - t): infinite at t = 1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from duotone.data.refusal import above, finite
from duotone.engine.objectives.base import Objective, Scalings, karras_sigmas, log_linear_sigmas, with_zero


def time_of(sigma_N: Tensor) -> Tensor:
    """t = sigma / (1 + sigma), 1 where sigma is infinite."""
    return 1 / (1 + 1 / sigma_N)


@dataclass(frozen=True, kw_only=True)
class Flow(Objective):
    """The network predicts the velocity noise - x0 of a straight path between image and noise."""

    times: Literal["uniform", "logit_normal"] = "logit_normal"
    """How t is drawn in training: uniform, or as the logistic function of a normal number (Esser et al. 2024, section 3.1)."""
    logit_mean: float = 0.0
    """Mean of that normal number; below 0 puts more of the training at low noise."""
    logit_std: float = 1.0
    """Standard deviation of that normal number."""
    shift: float = 1.0
    """Factor on every noise level in sampling; above 1 for larger images. Esser et al. 2024, equation 23."""

    spacings = ("trailing", "linspace", "karras", "log-linear")

    def check(self) -> None:
        for name in ("logit_std", "shift"):
            above(f"objective.{name}", getattr(self, name), 0)
        finite("objective.logit_mean", self.logit_mean)

    def draw_sigma(self, u_N: Tensor) -> Tensor:
        if self.times == "uniform":
            return u_N / (1 - u_N)
        # t is the logistic function of a normal number, so sigma = t / (1 - t) is that number's exponential: log-normal.
        return (self.logit_mean + self.logit_std * torch.special.ndtri(u_N)).exp()

    def scalings(self, sigma_N: Tensor) -> Scalings:
        t_N = time_of(sigma_N)
        signal_N = (1 / (1 + sigma_N)).masked_fill(sigma_N.isinf(), 1)
        return Scalings(skip_N=signal_N, out_N=-t_N, in_N=signal_N, noise_N=1000 * t_N)

    def weight(self, sigma_N: Tensor) -> Tensor:
        return 1 / time_of(sigma_N).square()

    def sampling_sigmas(self, steps: int, spacing: str = "trailing") -> Tensor:
        """trailing: t from 1 to 1 / steps; linspace: from 1 to 1 / 1000 (as diffusers at a shift of 1); karras, log-linear: finite sigmas."""
        low, high = 1 / 999, 999.0  # t = 0.001 and 0.999
        if spacing == "karras":
            return self.shift * karras_sigmas(low, high, steps)
        if spacing == "log-linear":
            return self.shift * log_linear_sigmas(low, high, steps)
        last = 1 / steps if spacing == "trailing" else 1 / 1000
        t = torch.linspace(1, last, steps, dtype=torch.float64)
        return with_zero(self.shift * t / (1 - t))
