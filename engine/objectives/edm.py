"""EDM: Karras et al. 2022, table 1, column "Ours"."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duotone.data.refusal import Refused, above, finite
from duotone.engine.objectives.base import Objective, Scalings, karras_sigmas, log_linear_sigmas
from duotone.engine.objectives.sigma_data import measured_sigma_data


@dataclass(frozen=True, kw_only=True)
class EDM(Objective):
    """log sigma is normally distributed; the network predicts a mix of image and noise with unit variance at every sigma."""

    sigma_data: float | None = 0.5
    """Standard deviation of pixel values scaled to [-1, 1]; None = measured from the data when the run begins."""
    log_mean: float = -1.2
    """Mean of log sigma in training (P_mean)."""
    log_std: float = 1.2
    """Standard deviation of log sigma in training (P_std)."""
    sigma_min: float = 0.002
    """Smallest noise level, in training and sampling."""
    sigma_max: float = 80.0
    """Largest noise level, in training and sampling."""
    rho: float = 7.0
    """Curvature of the sampling noise levels."""

    time_unit = 1.0

    def check(self) -> None:
        for name in ("sigma_data", "log_std", "rho"):
            if getattr(self, name) is not None:
                above(f"objective.{name}", getattr(self, name), 0)
        finite("objective.log_mean", self.log_mean)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise Refused(
                f"objective.sigma_min = {self.sigma_min}, objective.sigma_max = {self.sigma_max}: need 0 < sigma_min < "
                "sigma_max, both finite"
            )

    def fitted(self, data) -> "EDM":
        return self if self.sigma_data is not None else replace(self, sigma_data=measured_sigma_data(data))

    def draw_sigma(self, u_N: Tensor) -> Tensor:
        sigma_N = (self.log_mean + self.log_std * torch.special.ndtri(u_N)).exp()
        return sigma_N.clamp(self.sigma_min, self.sigma_max)

    def scalings(self, sigma_N: Tensor) -> Scalings:
        variance = sigma_N.square() + self.sigma_data**2
        return Scalings(
            skip_N=self.sigma_data**2 / variance,
            out_N=sigma_N * self.sigma_data / variance.sqrt(),
            in_N=1 / variance.sqrt(),
            noise_N=sigma_N.log() / 4,
        )

    def weight(self, sigma_N: Tensor) -> Tensor:
        return (sigma_N.square() + self.sigma_data**2) / (sigma_N * self.sigma_data).square()

    def sampling_sigmas(self, steps: int, spacing: str = "karras") -> Tensor:
        if spacing == "log-linear":
            return log_linear_sigmas(self.sigma_min, self.sigma_max, steps)
        return karras_sigmas(self.sigma_min, self.sigma_max, steps, self.rho)
