"""EDM2's learned uncertainty: the scale of the loss at each noise level, as a part of the network that is trained with it.

N images, K Fourier features.
"""

import math

import torch
from torch import Tensor, nn

from duotone.engine.model.blocks import EmbeddingLinear


class Uncertainty(nn.Module):
    """u(sigma), the logarithm of the expected loss: Karras et al. 2024, equation 14 and appendix B.3; one linear layer over
    Fourier features of c_noise, zero at first.

    It is part of the network so that the optimizer, its sharding and the checkpoints include it; sampling does not use it.
    """

    def __init__(self, time_unit: float, features: int = 128):
        """`time_unit` is a factor that brings c_noise to a range of a few units."""
        super().__init__()
        self.time_unit = time_unit
        self.linear = EmbeddingLinear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, time_N: Tensor) -> Tensor:
        features = self.linear.in_features
        # Fixed quantiles instead of random numbers, so that nothing must be stored and every rank has the same.
        place_K = (torch.arange(features, device=time_N.device, dtype=torch.float32) + 0.5) / features
        frequency_K, phase_K = torch.special.ndtri(place_K), (place_K * features * 0.618034) % 1
        angle_NK = 2 * math.pi * (time_N.float()[:, None] * self.time_unit * frequency_K + phase_K)
        waves_NK = math.sqrt(2) * angle_NK.cos()
        return self.linear(waves_NK.to(self.linear.weight.dtype))[:, 0].float()
