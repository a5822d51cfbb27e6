"""Class labels: a vector added to the time embedding, or a token for cross-attention. Class K, one past the last, is the null
class.

N images, D token width, E embedding width, K classes, W width of the sinusoid.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duotone.data.batch import Batch
from duotone.data.refusal import Refused
from duotone.engine.conditioning.base import Conditioner, Conditioning, Facts
from duotone.engine.model.blocks import Embedding, sinusoid
from duotone.engine.model.unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class Label:
    """One class per image."""

    kind = "label"

    port: Literal["vector", "tokens"] = "vector"
    """vector: added to the time embedding; tokens: a single token, for cross-attention."""
    encoding: Literal["embedding", "one_hot", "sinusoid"] = "embedding"
    """embedding: a learned row per class; one_hot: the class as a one-hot vector, through two layers; sinusoid: its number as
    a sinusoid (diffusers' class_embed_type "timestep"), through two layers."""
    dropout: float = 0.1
    """Share of labels replaced by the null class in training."""

    def build(self, network: UNetConfig, facts: Facts) -> "LabelConditioner":
        classes = classes_of(facts)
        width = network.context_width if self.port == "tokens" else network.embedding_width
        if self.encoding == "embedding":
            encoder = nn.Embedding(len(classes) + 1, width)
        elif self.encoding == "one_hot":
            encoder = OneHot(len(classes), width)
        else:
            encoder = Sinusoid(network, width)
        return LabelConditioner(classes, encoder, self.dropout, self.port)


def classes_of(facts: Facts) -> tuple[str, ...]:
    if not facts.classes:
        raise Refused(
            "conditioning by label needs class names, but the data has none: prepare it with classes (for your own "
            "pictures, one sub-folder per class), or take a recipe without a condition, such as recipes/celeba_edm.py"
        )
    return facts.classes


class OneHot(Embedding):
    """Two layers over a one-hot vector; the null class is all zeros."""

    def __init__(self, classes: int, width: int):
        super().__init__(classes, width)
        self.classes = classes

    def forward(self, rows_N: Tensor) -> Tensor:
        return super().forward(one_hot(rows_N, self.classes, self.linear_1.weight.dtype))


class Sinusoid(Embedding):
    """Two layers over the sinusoid of the class number, the same sinusoid as for the timestep."""

    def __init__(self, network: UNetConfig, width: int):
        super().__init__(network.channels[0], width)
        self.settings = {"width": network.channels[0], "flip": network.time_flip, "shift": network.time_shift}

    def forward(self, rows_N: Tensor) -> Tensor:
        return super().forward(sinusoid(rows_N, **self.settings).to(self.linear_1.weight.dtype))


def one_hot(rows_N: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(N, K) with the null class, number K, all zeros."""
    return F.one_hot(rows_N, classes + 1)[:, :classes].to(dtype)


class LabelConditioner(Conditioner):
    """A row for each class, as vector_NE or as the single token of tokens_NMD."""

    kind, keyword = "label", "labels"

    def __init__(self, classes: tuple[str, ...], encoder: nn.Module, dropout: float, port: str = "vector"):
        super().__init__()
        self.classes, self.dropout, self.port = classes, dropout, port
        self.embedding = encoder

    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        return {"labels_N": batch.labels_N}

    def of_values(self, values: list[int | str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        return {"labels_N": torch.tensor([class_index(value, self.classes) for value in values])}

    @torch.no_grad()
    def rows(self) -> Tensor:
        """The rows of all classes, (K + 1, width), the null class last: any encoding as an embedding table."""
        return self.embedding(torch.arange(len(self.classes) + 1, device=next(self.parameters()).device))

    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        row_ND = self.embedding(torch.where(keep_N, tensors["labels_N"], len(self.classes)))
        return Conditioning(vector_NE=row_ND) if self.port == "vector" else Conditioning(tokens_NMD=row_ND[:, None])


def class_index(value: int | str, classes: tuple[str, ...]) -> int:
    """The index of a class given by name or number."""
    value = value.item() if isinstance(value, Tensor) else value
    if value in classes:
        return classes.index(value)
    if str(value).isdecimal() and int(value) < len(classes):
        return int(value)
    raise Refused(
        f"label {value!r} is no class of this model: give a number below {len(classes)} or one of {', '.join(classes)}"
    )
