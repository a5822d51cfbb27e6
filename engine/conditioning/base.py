"""What a condition is to the network: three ports, and a null state for each kind.

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
    """What the data says of itself and a network must know: it is stored with the weights."""

    classes: tuple[str, ...] | None = None
    attributes: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The three ports: a vector added to the time embedding, tokens for cross-attention, channels beside the image.

    Channels of 1 x 1 pixels hold for every pixel.
    """

    vector_NE: Tensor | None = None
    tokens_NMD: Tensor | None = None
    mask_NM: Tensor | None = None
    channels_NKHW: Tensor | None = None


class Conditioner(nn.Module, ABC):
    """Turns one kind of condition into a Conditioning; keep_N False gives a row its null state."""

    kind: str
    """Its name within a network, which holds one of each kind."""
    asked: str
    """The keyword by which sample() is given its values."""
    nobody: object = 0
    """A value that stands in where nobody gave one; its row is not kept."""
    dropout: float
    spatial: bool = False
    """Whether it is given an image, which must then be mirrored as the network sees it."""
    extra_channels: int = 0
    """Channels that it adds to the network's input."""
    untrained: tuple[nn.Module, ...] = ()
    """What it holds beside what is trained."""

    @abstractmethod
    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        """The tensors of a training batch; what is drawn at random is a function of the seed and the batch's positions."""

    def of_batch_whole(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        """The same with all that the data says, where of_batch leaves out a part of it at random."""
        return self.of_batch(batch, seed)

    @abstractmethod
    def of_values(self, values: list, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The tensors of what a person asks for when sampling at `size` pixels; refuses values that do not fit."""

    def values_of(self, images_NHWC: np.ndarray, seed: int = 0) -> list:
        """What a person would ask for to have these images (uint8) restored; only a spatial condition is made of an image."""
        raise NotImplementedError

    def examples(self) -> list:
        """Values that previews are drawn with, of a kind that neither the recipe nor the data names."""
        return []

    @abstractmethod
    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        """The ports, with the rows that are not kept in their null state."""


def combine(parts: list[Conditioning]) -> Conditioning:
    """Several conditions as one: vectors add, tokens join along M, channels along K."""
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
    """Channels of 1 x 1 pixels, which are the same everywhere, spread over the size of the largest."""
    height, width = max(c.shape[2:] for c in channels)
    return [c.expand(-1, -1, height, width) for c in channels]


def full_mask(part: Conditioning) -> Tensor:
    if part.mask_NM is not None:
        return part.mask_NM
    return torch.ones(part.tokens_NMD.shape[:2], dtype=torch.bool, device=part.tokens_NMD.device)
