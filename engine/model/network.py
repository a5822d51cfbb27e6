"""The trained whole: a UNet and the conditioners that fill its ports.

N images, C channels of H x W pixels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from duotone.engine.conditioning.base import Conditioner, Conditioning, combine
from duotone.engine.model.unet import UNet


class Network(nn.Module):
    """F(c_in x; c_noise, condition)."""

    def __init__(self, unet: UNet, conditioners: list[Conditioner]):
        super().__init__()
        self.unet = unet
        self.conditioners = nn.ModuleDict({conditioner.kind: conditioner for conditioner in conditioners})

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def condition(self, tensors: dict[str, dict[str, Tensor]], keep: dict[str, Tensor]) -> Conditioning:
        """The ports from each conditioner's tensors and its rows to keep."""
        return combine([c(tensors[kind], keep[kind]) for kind, c in self.conditioners.items()])

    def forward(self, input_NCHW: Tensor, time_N: Tensor, tensors: dict, keep: dict) -> Tensor:
        return self.predict(input_NCHW, time_N, self.condition(tensors, keep))

    def predict(
        self, input_NCHW: Tensor, time_N: Tensor, condition: Conditioning, keys_values: Iterator | None = None
    ) -> Tensor:
        """F for a condition that is already computed; `keys_values` replace the projections of its tokens."""
        if condition.channels_NKHW is not None:
            input_NCHW = torch.cat([input_NCHW, condition.channels_NKHW.to(input_NCHW.dtype)], dim=1)
        tokens = condition.tokens_NMD if keys_values is None else keys_values
        return self.unet(input_NCHW, time_N, condition.vector_NE, tokens, condition.mask_NM)
