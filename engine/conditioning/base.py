"""How conditions enter the network: through three ports, with a null condition for each kind of condition.

N images, E embedding width, M tokens of width D, K channels of H x W pixels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from duotone.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a network must know about its data; stored with the weights."""

    classes: tuple[str, ...] | None = None
    attributes: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The three ports: a vector added to the time embedding, tokens for cross-attention, channels beside the image.

    Channels of 1 x 1 pixels are repeated at every pixel.
    """

    vector_NE: Tensor | None = None
    tokens_NMD: Tensor | None = None
    mask_NM: Tensor | None = None
    channels_NKHW: Tensor | None = None


class Conditioner(nn.Module, ABC):
    """Turns one kind of condition into a Conditioning; a row whose keep_N is False gets the null condition."""

    kind: str
    """Its name within a network, which has at most one of each kind."""
    keyword: str
    """The keyword argument of sample() that takes its values."""
    placeholder: object = 0
    """A placeholder for a value that was not given; its row gets the null condition."""
    dropout: float
    spatial: bool = False
    """Whether the condition is an image, which must be mirrored together with the training image."""
    extra_channels: int = 0
    """Channels that it adds to the network's input."""
    frozen_modules: tuple[nn.Module, ...] = ()
    """Frozen modules that it uses, which are not part of the trained state."""

    @abstractmethod
    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        """The tensors of a training batch; random draws depend only on the seed and the batch's positions."""

    def of_batch_whole(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        """The same as of_batch, but with nothing that the data says left out at random."""
        return self.of_batch(batch, seed)

    @abstractmethod
    def of_values(self, values: list, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The tensors of values given for sampling at `size` pixels; raises Refused if they do not fit."""

    def values_of(self, images_NHWC: np.ndarray, seed: int = 0) -> list:
        """The values to give to sample() to restore these images (uint8); spatial conditions only."""
        raise NotImplementedError

    def examples(self) -> list:
        """Values to draw previews with, for a kind of condition that neither the recipe nor the data has values for."""
        return []

    @abstractmethod
    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        """The ports; rows that are not kept are in their null condition."""


def combine(parts: list[Conditioning]) -> Conditioning:
    """Several conditions as one: vectors are added, tokens concatenated along M, channels along K."""
    vectors = [p.vector_NE for p in parts if p.vector_NE is not None]
    channels = [p.channels_NKHW for p in parts if p.channels_NKHW is not None]
    spoken = [p for p in parts if p.tokens_NMD is not None]
    return Conditioning(
        vector_NE=torch.stack(vectors).sum(0) if len(vectors) > 1 else (vectors or [None])[0],
        tokens_NMD=torch.cat([p.tokens_NMD for p in spoken], dim=1) if spoken else None,
        mask_NM=torch.cat([full_mask(p) for p in spoken], dim=1)
        if any(p.mask_NM is not None for p in spoken)
        else None,
        channels_NKHW=torch.cat(as_large(channels), dim=1) if channels else None,
    )


def as_large(channels: list[Tensor]) -> list[Tensor]:
    """Channels of 1 x 1 pixels expanded to the size of the largest."""
    height, width = max(c.shape[2:] for c in channels)
    return [c.expand(-1, -1, height, width) for c in channels]


def full_mask(part: Conditioning) -> Tensor:
    if part.mask_NM is not None:
        return part.mask_NM
    return torch.ones(part.tokens_NMD.shape[:2], dtype=torch.bool, device=part.tokens_NMD.device)
