"""The interface of every objective: four scalings, the distribution of sigma, a weight; one loss and one denoiser for all.

Everything works on x = x0 + sigma * noise, with the network wrapped as in Karras et al. 2022, equation 7:
D(x; sigma) = c_skip * x + c_out * F(c_in * x; c_noise). N images; sigmas are float64, a precision that tables of noise
levels and the tails of their distributions need.

Where sigma is infinite, x stands for x / sigma, which is the noise itself, in training, denoisers and samplers alike.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from duotone.data.refusal import Refused, whole

LossKind = Literal["squared", "absolute", "huber"]


class Scalings(NamedTuple):
    """The four functions of Karras et al. 2022, table 1, at N noise levels.

    At sigma = infinity skip_N and in_N are the limits of c_skip sigma and c_in sigma, since x stands for x / sigma there.
    """

    skip_N: Tensor
    out_N: Tensor
    in_N: Tensor
    noise_N: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    loss: LossKind = "squared"
    """Penalty on F - F*: squared, absolute or huber (transition at 1)."""
    stratified: bool = False
    """Spread the noise levels evenly over each global batch instead of drawing each one independently."""
    uncertainty: bool = False
    """Learn the loss's scale at each noise level with the network and divide by it; Karras et al. 2024, equations 14 and 15."""

    spacings = ("karras", "log-linear")
    """The ways in which sampling_sigmas can space its noise levels; the first is the default."""
    clips = False
    """Whether sampling keeps denoised images within [-1, 1] unless told otherwise (engine/sampling/samplers/clipping.py)."""
    time_unit = 0.004
    """Brings c_noise to a range of a few units (here from 0 .. 1000)."""

    @abstractmethod
    def check(self) -> None:
        """Raises Refused if settings contradict each other, naming the field."""

    def fitted(self, data) -> "Objective":
        """This objective, with the settings that are to be measured from the data set filled in."""
        return self

    @abstractmethod
    def draw_sigma(self, u_N: Tensor) -> Tensor:
        """sigma_N from u_N, uniform in [0, 1): the quantile function of the training distribution."""

    @abstractmethod
    def scalings(self, sigma_N: Tensor) -> Scalings:
        """The four scalings at sigma_N."""

    @abstractmethod
    def weight(self, sigma_N: Tensor) -> Tensor:
        """The weight of |D - x0|^2, as papers print it."""

    @abstractmethod
    def sampling_sigmas(self, steps: int, spacing: str) -> Tensor:
        """Falling noise levels for `steps` steps, the last one 0: float64, (steps + 1,)."""

    def falling_sigmas(self, steps: int, spacing: str | None = None) -> Tensor:
        """sampling_sigmas by a spacing's name, or by the default; raises Refused if the noise levels do not fall at every step."""
        whole("steps", steps, 1)
        known, kind = ", ".join(self.spacings), type(self).__name__
        if spacing not in (None, *self.spacings):
            raise Refused(f"spacing {spacing!r} is unknown to {kind}: there are {known}")
        sigmas = self.sampling_sigmas(int(steps), spacing or self.spacings[0])
        if not bool((sigmas[:-1] > sigmas[1:]).all()):
            raise Refused(
                f"steps = {steps}: noise levels must fall at every step, and these do not; take fewer steps or another "
                f"spacing ({known})"
            )
        return sigmas

    def coefficients(self, sigma_N: Tensor) -> Tensor:
        """(a, b, p, q) of each image, (N, 4): the network's input is a x0 + b noise, its target F* is p x0 + q noise.

        The target solves D = x0: F* = ((1 - c_skip) x0 - c_skip sigma noise) / c_out. Written so, it avoids x0 - c_skip x,
        which would cancel at small sigma.
        """
        c = self.scalings(sigma_N)
        far_N = sigma_N.isinf()
        sigma_N = sigma_N.masked_fill(far_N, 1)
        image_in_N, image_skip_N = c.in_N.masked_fill(far_N, 0), c.skip_N.masked_fill(far_N, 0)
        p_N, q_N = (1 - image_skip_N) / c.out_N, -c.skip_N * sigma_N / c.out_N
        return torch.stack([image_in_N, c.in_N * sigma_N, p_N, q_N], dim=1)

    def penalty(self, output_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
        """The unweighted penalty of each image, (N,), in fp32."""
        error = output_NCHW.float() - target_NCHW
        if self.loss == "squared":
            error = error.square()
        elif self.loss == "absolute":
            error = error.abs()
        else:
            error = torch.where(error.abs() < 1, 0.5 * error.square(), error.abs() - 0.5)
        return error.flatten(1).mean(1)

    def loss_weight(self, sigma_N: Tensor) -> Tensor:
        """The weight of |F - F*|^2: weight(sigma) c_out^2."""
        return self.weight(sigma_N) * self.scalings(sigma_N).out_N.square()

    def __call__(
        self, output_NCHW: Tensor, target_NCHW: Tensor, sigma_N: Tensor, log_scale_N: Tensor | None = None
    ) -> Tensor:
        """The mean loss of a batch at these noise levels; with the network's uncertainty u, loss / exp(u) + u.

        Training calls mean_loss instead, with weights already on the device; to change the loss, override weight or penalty.
        """
        return self.mean_loss(output_NCHW, target_NCHW, self.loss_weight(sigma_N).float(), log_scale_N)

    def mean_loss(
        self, output_NCHW: Tensor, target_NCHW: Tensor, weight_N: Tensor, log_scale_N: Tensor | None = None
    ) -> Tensor:
        """The same from each image's loss weight, which the caller has computed, perhaps on another device."""
        loss_N = weight_N * self.penalty(output_NCHW, target_NCHW)
        return (loss_N if log_scale_N is None else loss_N / log_scale_N.exp() + log_scale_N).mean()


def spaced_indices(count: int, steps: int, spacing: str) -> Tensor:
    """Falling indices into a table of `count` noise levels, float64; Lin et al. 2024, table 2 (leading, trailing, linspace)."""
    if spacing == "leading":
        return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (count // steps)
    if spacing == "trailing":
        return (torch.arange(steps, 0, -1, dtype=torch.float64) * (count / steps)).round() - 1
    return torch.linspace(count - 1, 0, steps, dtype=torch.float64)


def karras_sigmas(low: float, high: float, steps: int, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022, equation 5: `steps` noise levels from high to low, then 0."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return with_zero((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def log_linear_sigmas(low: float, high: float, steps: int) -> Tensor:
    """`steps` noise levels evenly spaced in log sigma from high to low, then 0."""
    return with_zero(torch.logspace(0, 1, steps, base=low / high, dtype=torch.float64) * high)


def with_zero(sigma: Tensor) -> Tensor:
    return torch.cat([sigma, sigma.new_zeros(1)])
