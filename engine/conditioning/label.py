"""Class labels: a vector added to the time embedding; row K of K + 1 is the null class.

N images, E embedding width, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duotone.data.batch import Batch
from duotone.data.refusal import Refused
from duotone.engine.conditioning.base import Conditioner, Conditioning, Facts
from duotone.engine.model.unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class Label:
    """One class per image."""

    dropout: float = 0.1
    """Share of labels replaced by the null class in training."""

    def build(self, network: UNetConfig, facts: Facts) -> "LabelConditioner":
        if not facts.classes:
            raise Refused("conditioning by label needs class names, and the data has none: prepare it with classes")
        return LabelConditioner(facts.classes, network.embedding_width, self.dropout)


class LabelConditioner(Conditioner):
    """An embedding row for each class."""

    kind = "label"

    def __init__(self, classes: tuple[str, ...], width: int, dropout: float):
        super().__init__()
        self.classes, self.dropout = classes, dropout
        self.embedding = nn.Embedding(len(classes) + 1, width)

    def of_batch(self, batch: Batch) -> dict[str, Tensor]:
        return {"labels_N": batch.labels_N}

    def of_values(self, values: list[int | str]) -> dict[str, Tensor]:
        return {"labels_N": torch.tensor([class_index(value, self.classes) for value in values])}

    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        rows_N = torch.where(keep_N, tensors["labels_N"], len(self.classes))
        return Conditioning(vector_NE=self.embedding(rows_N))


def class_index(value: int | str, classes: tuple[str, ...]) -> int:
    """The index of a class given by name or number."""
    if value in classes:
        return classes.index(value)
    if str(value).isdigit() and int(value) < len(classes):
        return int(value)
    raise Refused(
        f"label {value!r} is no class of this model: give a number below {len(classes)} or one of {', '.join(classes)}"
    )
