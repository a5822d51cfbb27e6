"""Denoisers for samplers: D(x; sigma) from a network, an objective and a condition, with both branches of guidance in one batch.

N images, C channels, H x W pixels; 2N rows: the first half conditional, the second unconditional.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from duotone.data.batch import to_device
from duotone.engine.conditioning.base import Conditioning
from duotone.engine.cuda_graph import Recordings
from duotone.engine.model.network import Network
from duotone.engine.model.unet import UNet, UNetConfig
from duotone.engine.objectives.base import Objective
from duotone.engine.sampling.samplers.clipping import clip
from duotone.kernels.guided_step import guided_step


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): D = D_uncond + scale (D_cond - D_uncond)."""

    scale_N: Tensor
    """The scale of each image, on the CPU: 0 = unconditional, 1 = conditional, above 1 = guided."""
    interval: tuple[float, float] = (0.0, float("inf"))
    """The range of sigma in which guidance acts; elsewhere the prediction is conditional. Kynkaanniemi et al. 2024."""
    rescale: float = 0.0
    """How far, from 0 to 1, the standard deviation of each image's guided network output is pulled back to the conditional one's.

    It acts on the network's output, as in Lin et al. 2024 (equations 14 to 16) and diffusers: for epsilon and v, the same number
    has the same effect."""
    rule: Callable | None = None
    """Another way to combine D_cond and D_uncond: rule(D_cond, D_uncond, scale_N, sigma)."""
    clip: bool = False
    """Clip D_cond and D_uncond to [-1, 1] before the rule combines them, and D_cond where guidance does not act."""

    def acts_at(self, sigma: float) -> bool:
        wanted = self.rule is not None or bool((self.scale_N != 1).any())
        return wanted and self.interval[0] <= sigma <= self.interval[1]


class GuidedDenoiser:
    """denoise(x, sigma) for samplers. `calls` counts its calls, `forwards` their cost in forward passes of one image.

    Where sigma is infinite, x is the noise itself (engine/objectives/base.py).
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        both: Conditioning,
        guidance: Guidance | None,
        guide: tuple[Network, Conditioning] | None = None,
    ):
        """`both` has 2N rows with guidance, the conditional ones first, and N rows without.

        With a `guide`, a weaker network and its condition, `both` has N rows: the guide is the second branch
        (autoguidance, Karras et al. 2024b).
        """
        self.network, self.objective, self.guidance, self.guide = network, objective, guidance, guide
        self.both = both
        self.scale_N = None if guidance is None else guidance.scale_N.to(network.device)
        self.half = both if guidance is None or guide else first_half(both)
        stored = keys_values(network, both)
        self.keys_values = {id(both): stored, id(self.half): stored if self.half is both else halves(stored)}
        if guide:
            self.keys_values[id(guide[1])] = keys_values(*guide)
        self.recordings = Recordings(recording=network.records)
        self.pair_cost: float | None = None
        self.calls, self.forwards = 0, 0.0

    @torch.inference_mode()
    def __call__(self, x_NCHW: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        sigma_N = torch.full((x_NCHW.shape[0],), sigma, dtype=torch.float64)
        skip_N, out_N, in_N, noise_N = scalings(self.objective, sigma_N, x_NCHW.device)
        scaled_NCHW = x_NCHW * in_N[:, None, None, None]
        if self.guidance is None or not self.guidance.acts_at(sigma):
            return self.image(self.predict(self.network, scaled_NCHW, noise_N, self.half), x_NCHW, skip_N, out_N)
        return self.guided(self.outputs(scaled_NCHW, noise_N), x_NCHW, skip_N, out_N, sigma)

    def guided(self, output_2NCHW: Tensor, x_NCHW: Tensor, skip_N: Tensor, out_N: Tensor, sigma: float) -> Tensor:
        """D from both branches' outputs."""
        guidance = self.guidance
        if not output_2NCHW.is_contiguous():  # a network with padded channels returns a slice
            output_2NCHW = output_2NCHW.contiguous(memory_format=torch.channels_last)
        if guidance.rule is not None:
            conditional_NCHW, other_NCHW = (self.image(f, x_NCHW, skip_N, out_N) for f in output_2NCHW.chunk(2))
            return guidance.rule(conditional_NCHW, other_NCHW, self.scale_N, sigma)
        if guidance.rescale == 0:
            return guided_step(output_2NCHW, x_NCHW, skip_N, out_N, self.scale_N)
        # The kernel rescales the deviation of c_skip x + c_out F; with c_skip = 0 and c_out = 1 that is the network's output F.
        zero_N, one_N = torch.zeros_like(skip_N), torch.ones_like(out_N)
        output_NCHW = guided_step(output_2NCHW, x_NCHW, zero_N, one_N, self.scale_N, rescale=guidance.rescale)
        return denoised(output_NCHW, x_NCHW, skip_N, out_N)

    def image(self, output_NCHW: Tensor, x_NCHW: Tensor, skip_N: Tensor, out_N: Tensor) -> Tensor:
        """D of one branch."""
        denoised_NCHW = denoised(output_NCHW, x_NCHW, skip_N, out_N)
        return clip(denoised_NCHW) if self.guidance is not None and self.guidance.clip else denoised_NCHW

    def outputs(self, scaled_NCHW: Tensor, noise_N: Tensor) -> Tensor:
        """F of both branches, (2N, C, H, W)."""
        if self.guide:
            own_NCHW = self.predict(self.network, scaled_NCHW, noise_N, self.half)
            return torch.cat([own_NCHW, self.predict(self.guide[0], scaled_NCHW, noise_N, self.guide[1])])
        if self.begins_alike():
            self.forwards += scaled_NCHW.shape[0] * (self.cost_of_pair(scaled_NCHW) - 1)
            return self.predict(self.network, scaled_NCHW, noise_N, self.both, copies=2)
        return self.predict(self.network, torch.cat([scaled_NCHW] * 2), noise_N.repeat(2), self.both)

    def begins_alike(self) -> bool:
        """Whether both branches are identical up to the first cross-attention, because they differ only in their tokens."""
        both = self.both
        return both.tokens_NMD is not None and both.vector_NE is None and both.channels_NKHW is None

    def cost_of_pair(self, scaled_NCHW: Tensor) -> float:
        if self.pair_cost is None:
            self.pair_cost = cost_of_pair(
                self.network.unet, tuple(scaled_NCHW.shape[1:]), self.both.tokens_NMD.shape[1]
            )
        return self.pair_cost

    def predict(
        self, network: Network, scaled_NCHW: Tensor, noise_N: Tensor, condition: Conditioning, copies: int = 1
    ) -> Tensor:
        self.forwards += scaled_NCHW.shape[0]
        stored = self.keys_values[id(condition)]

        def output(scaled_NCHW: Tensor, noise_N: Tensor) -> Tensor:
            return network.predict(scaled_NCHW, noise_N, condition, stored, copies=copies)

        return self.recordings((id(condition), copies), output, scaled_NCHW.to(network.dtype), noise_N)


def scalings(objective: Objective, sigma_N: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """c_skip, c_out, c_in and c_noise on the device, in fp32, sent in one asynchronous copy."""
    return to_device(torch.stack(tuple(objective.scalings(sigma_N))).float(), device).unbind()


def denoised(output_NCHW: Tensor, x_NCHW: Tensor, skip_N: Tensor, out_N: Tensor) -> Tensor:
    """D = c_skip x + c_out F."""
    return x_NCHW * skip_N[:, None, None, None] + output_NCHW.float() * out_N[:, None, None, None]


def first_half(both: Conditioning) -> Conditioning:
    return Conditioning(**{name: None if v is None else v[: v.shape[0] // 2] for name, v in vars(both).items()})


@torch.inference_mode()
def keys_values(network: Network, condition: Conditioning) -> list[tuple[Tensor, Tensor]] | None:
    """The tokens' keys and values for every cross-attention; they are the same at every step, so they are projected once."""
    if condition.tokens_NMD is None:
        return None
    return [attention.keys_values(condition.tokens_NMD) for attention in network.unet.cross_attentions()]


def halves(stored: list[tuple[Tensor, Tensor]] | None) -> list[tuple[Tensor, Tensor]] | None:
    """The conditional rows' keys and values, which come first."""
    return stored and [(k[: len(k) // 2], v[: len(v) // 2]) for k, v in stored]


def cost_of_pair(unet: UNet, shape_CHW: tuple[int, int, int], tokens: int) -> float:
    """The FLOPs of both branches, their shared first layers counted once, as a multiple of one forward pass."""
    return pair_cost(unet.config, shape_CHW, tokens)


@cache
def pair_cost(config: UNetConfig, shape_CHW: tuple[int, int, int], tokens: int) -> float:
    with torch.device("meta"):
        twin = UNet(config)
        x_NCHW, time_N = torch.empty(1, *shape_CHW), torch.empty(1)
        tokens_NMD = torch.empty(2, tokens, config.context_width)
        with FlopCounterMode(display=False) as pair:
            twin(x_NCHW, time_N, None, tokens_NMD, copies=2)
        with FlopCounterMode(display=False) as single:
            twin(x_NCHW, time_N, None, tokens_NMD[:1])
    return pair.get_total_flops() / single.get_total_flops()
