"""DDPM: Ho et al. 2020, with later schedules and predictions."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from duotone.data.refusal import Refused, above, at_least
from duotone.engine.objectives.base import (
    Objective,
    Scalings,
    karras_sigmas,
    log_linear_sigmas,
    spaced_indices,
    with_zero,
)

Schedule = Literal["linear", "scaled_linear", "cosine"]


@lru_cache
def alpha_bars(schedule: Schedule, steps: int) -> Tensor:
    """The product of (1 - beta) up to each of T steps, float64, (T,).

    linear: Ho et al. 2020, section 4; scaled_linear (quadratic): Rombach et al. 2022; cosine: Nichol and Dhariwal 2021,
    equation 17, betas clipped at 0.999.
    """
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64).square()
    else:
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        bars = ((t + 0.008) / 1.008 * torch.pi / 2).cos().square()
        betas = (1 - bars[1:] / bars[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


def without_signal_at_the_end(bars: Tensor) -> Tensor:
    """The alpha-bars rescaled so that the last is zero and the first unchanged: Lin et al. 2024, algorithm 1."""
    roots = bars.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()


@lru_cache
def table(schedule: Schedule, steps: int, zero_snr: bool = False) -> Tensor:
    """sigma of every step in the variance-exploding view, rising, (T,): sqrt((1 - alpha_bar) / alpha_bar)."""
    bars = alpha_bars(schedule, steps)
    if zero_snr:
        bars = without_signal_at_the_end(bars)
    return ((1 - bars) / bars).sqrt()


@dataclass(frozen=True, kw_only=True)
class DDPM(Objective):
    """T discrete noise levels, all of which are trained; the network predicts the noise, the image or the velocity."""

    schedule: Schedule = "linear"
    """How alpha-bar falls."""
    steps: int = 1000
    """T, the number of noise levels, not of sampling steps. linear and scaled_linear are designed for 1000: with far fewer, some
    of the image is still visible at the last level, but sampling starts from pure noise."""
    prediction: Literal["epsilon", "x0", "v"] = "epsilon"
    """What the network's output means."""
    weighting: Literal["simple", "snr", "min_snr", "soft_min_snr"] = "simple"
    """Weight of the loss in the prediction's own space, as papers print it; snr multiplies an x0 loss by alpha-bar / (1 - alpha-bar)."""
    gamma: float = 5.0
    """Bound of min-SNR (Hang et al. 2023) and soft-min-SNR (Crowson et al. 2024)."""

    rescale_zero_snr: bool = False
    """Rescale the schedule so that its last noise level is infinite, pure noise; needs v or x0. Lin et al. 2024."""

    spacings = ("trailing", "leading", "linspace", "karras", "log-linear")
    clips = True

    def check(self) -> None:
        at_least("objective.steps", self.steps, 2)
        above("objective.gamma", self.gamma, 0)
        if self.rescale_zero_snr and self.prediction == "epsilon":
            raise Refused(
                "objective.rescale_zero_snr with prediction epsilon: at infinite noise, predicting the noise says nothing "
                "about the image; take objective.prediction v or x0"
            )

    @property
    def sigmas(self) -> Tensor:
        return table(self.schedule, self.steps, self.rescale_zero_snr)

    def draw_sigma(self, u_N: Tensor) -> Tensor:
        step_N = (u_N * self.steps).long().clamp(max=self.steps - 1)
        return self.sigmas.to(u_N.device)[step_N]

    def index(self, sigma_N: Tensor) -> Tensor:
        """The fractional index of sigma_N in the table, interpolated in log sigma: exact at the table's own values."""
        logs = self.sigmas.to(sigma_N.device).log()
        log_N = sigma_N.log().clamp(logs[0], logs[-1])
        high_N = torch.searchsorted(logs, log_N).clamp(1, self.steps - 1)
        low_log, high_log = logs[high_N - 1], logs[high_N]
        share_N = (log_N - low_log) / (high_log - low_log)
        return high_N - 1 + share_N.masked_fill(log_N.isinf(), 1)

    def scalings(self, sigma_N: Tensor) -> Scalings:
        signal_N = 1 / (1 + sigma_N.square()).sqrt()  # sqrt(alpha-bar)
        noise_N = 1 / (1 + 1 / sigma_N.square()).sqrt()  # sqrt(1 - alpha-bar), also where sigma is infinite
        skip_N, out_N = {
            "epsilon": (torch.ones_like(sigma_N), -sigma_N),
            "x0": (torch.zeros_like(sigma_N), torch.ones_like(sigma_N)),
            "v": (signal_N.square(), -noise_N),
        }[self.prediction]
        in_N = signal_N.masked_fill(sigma_N.isinf(), 1)
        return Scalings(skip_N=skip_N, out_N=out_N, in_N=in_N, noise_N=self.index(sigma_N))

    def weight(self, sigma_N: Tensor) -> Tensor:
        return self.output_weight(sigma_N) / self.scalings(sigma_N).out_N.square()

    def output_weight(self, sigma_N: Tensor) -> Tensor:
        """The weight of |F - F*|^2."""
        snr_N = 1 / sigma_N.square()
        out_N = self.scalings(sigma_N).out_N
        if self.weighting == "simple":
            return torch.ones_like(sigma_N)
        if self.weighting == "snr":
            return snr_N * out_N.square()
        if self.weighting == "min_snr":
            return snr_N.clamp(max=self.gamma) * out_N.square()
        return snr_N * self.gamma / (snr_N + self.gamma) * out_N.square()

    def sampling_sigmas(self, steps: int, spacing: str = "trailing") -> Tensor:
        low, high = self.sigmas[0].item(), self.sigmas[self.sigmas.isfinite()][-1].item()
        if spacing == "karras":
            return karras_sigmas(low, high, steps)
        if spacing == "log-linear":
            return log_linear_sigmas(low, high, steps)
        return with_zero(self.at(spaced_indices(self.steps, steps, spacing)))

    def at(self, index: Tensor) -> Tensor:
        """sigma at fractional indices, interpolated in log sigma."""
        logs = self.sigmas.log()
        low = index.floor().long().clamp(0, self.steps - 1)
        high = (low + 1).clamp(max=self.steps - 1)
        between = logs[low] + (index - low) * (logs[high] - logs[low])
        return torch.where(index == low, logs[low], between).exp()
