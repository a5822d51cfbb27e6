"""The whole trained network: a UNet and the conditioners that fill its ports.

N images, C channels of H x W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from duotone.data.refusal import Refused
from duotone.engine.conditioning.base import Conditioner, Conditioning, combine
from duotone.engine.model.uncertainty import Uncertainty
from duotone.engine.model.unet import UNet
from duotone.engine.objectives.guidance_free import guidance_free


class Network(nn.Module):
    """F(c_in x; c_noise, condition)."""

    def __init__(self, unet: UNet, conditioners: list[Conditioner], uncertainty: Uncertainty | None = None):
        super().__init__()
        self.unet = unet
        self.conditioners = nn.ModuleDict({conditioner.kind: conditioner for conditioner in conditioners})
        self.uncertainty = uncertainty
        self.records = False
        """Whether sampling replays its forward passes as CUDA graphs."""
        self.refuse_other_channels()

    def refuse_other_channels(self) -> None:
        given = {kind: c.extra_channels for kind, c in self.conditioners.items() if c.extra_channels}
        if sum(given.values()) != self.unet.config.extra_channels:
            listed = " + ".join(f"{count} of {kind}" for kind, count in given.items()) or "none"
            raise Refused(
                f"model.extra_channels = {self.unet.config.extra_channels}, but the conditioning adds "
                f"{sum(given.values())} channels ({listed}): set model.extra_channels to {sum(given.values())}"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The frozen modules of the conditioners: text encoders."""
        return [module for conditioner in self.conditioners.values() for module in conditioner.frozen_modules]

    def condition(self, tensors: dict[str, dict[str, Tensor]], keep: dict[str, Tensor]) -> Conditioning:
        """The ports, from each conditioner's tensors and its keep_N."""
        return combine([c(tensors[kind], keep[kind]) for kind, c in self.conditioners.items()])

    def forward(self, input_NCHW: Tensor, time_N: Tensor, tensors: dict, keep: dict) -> tuple[Tensor, Tensor | None]:
        """For training: F and, if it is learned, the loss's log scale u_N."""

        def predict(tensors: dict, keep: dict) -> Tensor:
            return self.predict(input_NCHW, time_N, self.condition(tensors, keep))

        mixed = "temperature" in self.conditioners
        output_NCHW = guidance_free(predict, tensors, keep) if mixed else predict(tensors, keep)
        return output_NCHW, None if self.uncertainty is None else self.uncertainty(time_N)

    def predict(
        self,
        input_NCHW: Tensor,
        time_N: Tensor,
        condition: Conditioning,
        keys_values: Sequence[tuple[Tensor, Tensor]] | None = None,
        copies: int = 1,
    ) -> Tensor:
        """F for a condition that is already computed; `keys_values`, if given, replace the projections of its tokens.

        With `copies`, the tokens have that many times the rows of the input; the layers before the first that reads them run once.
        """
        if condition.channels_NKHW is not None:
            channels_NKHW = condition.channels_NKHW.to(input_NCHW.dtype).expand(-1, -1, *input_NCHW.shape[2:])
            input_NCHW = torch.cat([input_NCHW, channels_NKHW], dim=1)
        tokens = condition.tokens_NMD if keys_values is None else iter(keys_values)
        return self.unet(input_NCHW, time_N, condition.vector_NE, tokens, condition.mask_NM, copies=copies)
