"""Denoisers for samplers: D(x; sigma) from a network, an objective and a condition, guided by both branches in one batch.

N images, C channels, H x W pixels; 2N rows: the first half conditional, the second unconditional.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.engine.conditioning.base import Conditioning
from duotone.engine.model.network import Network
from duotone.engine.objectives.base import Objective
from duotone.kernels.guided_step import guided_step


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): D = D_uncond + scale (D_cond - D_uncond)."""

    scale_N: Tensor
    """Of each image; 0 = unconditional, 1 = conditional, above 1 = guided."""
    interval: tuple[float, float] = (0.0, float("inf"))
    """Guided where sigma lies in it, conditional elsewhere; Kynkaanniemi et al. 2024."""
    rescale: float = 0.0
    """Share by which each image's standard deviation is pulled back to the conditional one's; Lin et al. 2024."""

    def acts_at(self, sigma: float) -> bool:
        return self.interval[0] <= sigma <= self.interval[1] and bool((self.scale_N != 1).any())


class GuidedDenoiser:
    """denoise(x, sigma) for samplers; counts what it cost in forward passes of one image."""

    def __init__(self, network: Network, objective: Objective, both: Conditioning, guidance: Guidance | None):
        """`both` holds 2N rows where there is guidance, the conditional ones first; N rows where there is none."""
        self.network, self.objective, self.guidance = network, objective, guidance
        self.both = both
        self.half = both if guidance is None else first_half(both)
        self.keys_values = {id(c): keys_values(network, c) for c in (self.both, self.half)}
        self.forwards = 0

    @torch.inference_mode()
    def __call__(self, x_NCHW: Tensor, sigma: float) -> Tensor:
        sigma_N = torch.full((x_NCHW.shape[0],), sigma, dtype=torch.float64)
        c = [value.to(x_NCHW.device, torch.float32) for value in self.objective.scalings(sigma_N)]
        skip_N, out_N, in_N, noise_N = c
        scaled_NCHW = x_NCHW * in_N[:, None, None, None]
        if self.guidance is None or not self.guidance.acts_at(sigma):
            output_NCHW = self.predict(scaled_NCHW, noise_N, self.half)
            return x_NCHW * skip_N[:, None, None, None] + output_NCHW.float() * out_N[:, None, None, None]
        output_2NCHW = self.predict(torch.cat([scaled_NCHW] * 2), noise_N.repeat(2), self.both)
        return guided_step(output_2NCHW, x_NCHW, skip_N, out_N, self.guidance.scale_N, rescale=self.guidance.rescale)

    def predict(self, scaled_NCHW: Tensor, noise_N: Tensor, condition: Conditioning) -> Tensor:
        self.forwards += scaled_NCHW.shape[0]
        stored = self.keys_values[id(condition)]
        scaled_NCHW = scaled_NCHW.to(self.network.dtype)
        return self.network.predict(scaled_NCHW, noise_N, condition, None if stored is None else iter(stored))


def first_half(both: Conditioning) -> Conditioning:
    return Conditioning(**{name: None if v is None else v[: v.shape[0] // 2] for name, v in vars(both).items()})


@torch.inference_mode()
def keys_values(network: Network, condition: Conditioning) -> list[tuple[Tensor, Tensor]] | None:
    """The tokens' keys and values for every cross-attention: the same at every step, so projected once."""
    if condition.tokens_NMD is None:
        return None
    return [attention.keys_values(condition.tokens_NMD) for attention in network.unet.cross_attentions()]
