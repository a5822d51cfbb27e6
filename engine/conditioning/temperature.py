"""The temperature of guidance-free training: the strength of guidance as a condition of the network.

N images, E embedding width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.data.batch import Batch
from duotone.data.refusal import share
from duotone.engine import draws
from duotone.engine.conditioning.base import Conditioner, Conditioning, Facts
from duotone.engine.model.blocks import Embedding, sinusoid
from duotone.engine.model.unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Guidance-free training (engine/objectives/guidance_free.py): sampling at guidance 1 / beta then costs one forward pass."""

    kind = "temperature"
    port = "vector"
    dropout = 0.0

    low: float = 0.0
    """Smallest beta drawn in training, where beta is uniform in [low, 1]; 1 / low is the strongest guidance."""

    def build(self, network: UNetConfig, facts: Facts) -> "TemperatureConditioner":
        share("conditioning: Temperature.low", self.low, below_one=True)
        return TemperatureConditioner(self.low, network)


class TemperatureConditioner(Conditioner):
    """beta_N through a sinusoid and two layers, like the timestep; the null condition is 1, the plain conditional prediction."""

    kind, keyword = "temperature", "temperatures"
    placeholder = 1.0
    dropout = 0.0

    def __init__(self, low: float, network: UNetConfig):
        super().__init__()
        self.low, self.width = low, network.channels[0]
        self.embedding = Embedding(self.width, network.embedding_width)

    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        u_N = draws.uniform(seed, batch.positions_N, draws.Purpose.TEMPERATURE)[:, 0]
        return {"beta_N": (self.low + (1 - self.low) * u_N).float()}

    def of_values(self, values: list[float], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        return {"beta_N": torch.tensor(values, dtype=torch.float32)}

    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        beta_N = torch.where(keep_N, tensors["beta_N"], 1.0)
        waves = sinusoid(1000 * beta_N, self.width).to(self.embedding.linear_1.weight.dtype)
        return Conditioning(vector_NE=self.embedding(waves))
