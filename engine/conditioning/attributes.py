"""Attributes: several yes-or-no facts of one image, each of which may be unknown.

N images, K attributes, D token width, E embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from duotone.data.batch import Batch, to_device
from duotone.data.refusal import Refused, share
from duotone.engine import draws
from duotone.engine.conditioning.base import Conditioner, Conditioning, Facts
from duotone.engine.model.unet import UNetConfig

UNKNOWN = -1
STATES = 3  # absent, present, unknown; unknown is the attribute's null condition


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """Present, absent or unknown for each attribute of the data."""

    kind = "attributes"

    port: Literal["tokens", "vector"] = "tokens"
    """tokens: one token per attribute, for cross-attention; vector: the sum of their rows, added to the time embedding."""
    dropout: float = 0.1
    """Share of images whose attributes are all made unknown in training."""
    attribute_dropout: float = 0.1
    """Probability with which each single attribute is made unknown in training, independently of the others."""

    def build(self, network: UNetConfig, facts: Facts) -> "AttributesConditioner":
        share("conditioning: attribute_dropout", self.attribute_dropout)
        if not facts.attributes:
            raise Refused(
                "conditioning by attributes needs attribute names, but the data has none: prepare it with attributes"
            )
        return AttributesConditioner(self, facts.attributes, network)


class AttributesConditioner(Conditioner):
    """A learned row for each attribute and state, as tokens_NKD or summed into vector_NE."""

    kind, keyword = "attributes", "attributes"
    placeholder: Mapping = {}

    def __init__(self, config: Attributes, names: tuple[str, ...], network: UNetConfig):
        super().__init__()
        self.names, self.port = names, config.port
        self.dropout, self.attribute_dropout = config.dropout, config.attribute_dropout
        width = network.context_width if config.port == "tokens" else network.embedding_width
        self.embedding = nn.Embedding(len(names) * STATES, width)

    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        u_NK = draws.uniform(seed, batch.positions_N, draws.Purpose.ATTRIBUTE_DROP, len(self.names))
        dropped_NK = to_device(u_NK < self.attribute_dropout, batch.attributes_NK.device)
        return {"attributes_NK": batch.attributes_NK.masked_fill(dropped_NK, UNKNOWN)}

    def of_batch_whole(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        return {"attributes_NK": batch.attributes_NK}

    def of_values(self, values: list, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        rows = [attribute_row(value, self.names) for value in values]
        return {"attributes_NK": torch.tensor(rows, dtype=torch.int8)}

    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        state_NK = tensors["attributes_NK"].long().masked_fill(~keep_N[:, None], UNKNOWN) % STATES
        first_K = torch.arange(len(self.names), device=keep_N.device) * STATES
        rows_NKD = self.embedding(first_K + state_NK)
        if self.port == "tokens":
            return Conditioning(tokens_NMD=rows_NKD)
        return Conditioning(vector_NE=rows_NKD.sum(1))


def attribute_row(value: Mapping | Sequence, names: tuple[str, ...]) -> list[int]:
    """The state of every attribute: 1 present, 0 absent, -1 unknown. A value may be given in one of three ways.

    A vector of 0, 1 and None (or -1) in the model's order; a list of the names that are present, all others being absent;
    or a mapping from names to 0, 1 or None, all others being unknown.
    """
    if isinstance(value, Mapping):
        known = {place(name, names): state_of(state) for name, state in value.items()}
        return [known.get(i, UNKNOWN) for i in range(len(names))]
    if isinstance(value, str):
        raise Refused(f"attributes {value!r} is a string: give each image a list, as in [{value!r}]")
    if not hasattr(value, "__iter__"):
        raise Refused(f"attributes {value!r} is a single number: give each image a vector, as in [[1, 0, ...]]")
    value = list(value)
    if all(isinstance(name, str) for name in value):
        present = {place(name, names) for name in value}
        return [int(i in present) for i in range(len(names))]
    if len(value) != len(names):
        raise Refused(f"attributes has {len(value)} entries, but this model knows {len(names)}: {', '.join(names)}")
    return [state_of(state) for state in value]


def states_in(text: str) -> dict[str, int]:
    """The states that a text asks for: {"Smiling": 1, "Male": 0} for "Smiling,Male=0"; raises Refused if it is malformed."""
    states: dict[str, int] = {}
    for part in text.split(","):
        name, _, state = part.strip().partition("=")
        if not name or state not in ("", "0", "1"):
            raise Refused(f"attribute {part.strip()!r}: write NAME, or NAME=0, several with commas between them")
        if name in states:
            raise Refused(f"attribute {name!r} is given twice: give it once")
        states[name] = int(state or 1)
    return states


def place(name: str, names: tuple[str, ...]) -> int:
    if name not in names:
        raise Refused(f"attribute {name!r} is not one of this model's: it knows {', '.join(names)}")
    return names.index(name)


def state_of(state) -> int:
    if state is None:
        return UNKNOWN
    if state not in (0, 1, UNKNOWN):
        raise Refused(f"attribute value {state!r}: give 0 (absent), 1 (present) or None (unknown)")
    return int(state)
