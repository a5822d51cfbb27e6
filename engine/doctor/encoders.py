"""Text as the doctor reads it: each distinct caption is encoded once, and a missing encoder is replaced by a stand-in.

N captions, M tokens, D token width.
"""

from collections.abc import Callable
from hashlib import blake2b
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from duotone.engine.conditioning.base import Conditioner
from duotone.engine.conditioning.text import ClipText, EncoderText, TextConditioner
from duotone.engine.model.unet import UNetConfig


class Once:
    """A TextConditioner's encode, (N, M, D), that runs once for each distinct caption, however many rows have it."""

    def __init__(self, encode: Callable[[dict[str, Tensor]], Tensor]):
        self.encode, self.known_MD = encode, {}

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        rows_N2M = torch.stack([tensors["ids_NM"], tensors["mask_NM"].long()], dim=1)
        names = [row.tobytes() for row in rows_N2M.numpy()]
        first = {name: i for i, name in enumerate(names) if name not in self.known_MD}
        if first:
            unseen = {key: tensor[list(first.values())] for key, tensor in tensors.items()}
            self.known_MD |= zip(first, self.encode(unseen), strict=True)
        return torch.stack([self.known_MD[name] for name in names])


def reading_once(tokens: Callable[[list[str]], dict[str, Tensor]]) -> Callable[[list[str]], dict[str, Tensor]]:
    """A tokenizer that reads each distinct caption of a list once."""

    def read(captions: list[str]) -> dict[str, Tensor]:
        places = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        pick_N = torch.tensor([places[caption] for caption in captions])
        return {name: tensor[pick_N] for name, tensor in tokens(list(places)).items()}

    return read


def encoding_once(conditioner: Conditioner) -> Conditioner:
    """The same conditioner; if it is one for text, it now reads and encodes each caption once."""
    if isinstance(conditioner, TextConditioner):
        conditioner.tokens, conditioner.encode = reading_once(conditioner.tokens), Once(conditioner.encode)
    return conditioner


class RowsOfBytes(nn.Module):
    """Stands in for a text encoder: a random row for each byte."""

    def __init__(self, width: int):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)
        self.rows = nn.Embedding(256, width)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.rows(input_ids))


def digests(captions: list[str]) -> dict[str, Tensor]:
    """Eight bytes for each caption, which differ for different captions, however long they are."""
    rows = [list(blake2b(caption.encode(), digest_size=8).digest()) for caption in captions]
    ids_NM = torch.tensor(rows)
    return {"ids_NM": ids_NM, "mask_NM": torch.ones_like(ids_NM, dtype=torch.bool)}


def stand_in(condition: ClipText | EncoderText, network: UNetConfig) -> TextConditioner:
    """A text condition with its own settings but a stand-in's tokens, whose values do not matter for counting drops."""
    encoder = RowsOfBytes(network.context_width)
    return TextConditioner(encoder, digests, condition.dropout, network, frozen=True).eval()
