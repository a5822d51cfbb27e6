"""Text: captions as tokens for cross-attention, from a frozen encoder (CLIP, T5 ...) or a small byte-level one trained with the network.

N captions, M tokens, D token width.
"""

import contextlib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duotone.data.batch import Batch
from duotone.data.refusal import Refused, at_least, first_line
from duotone.engine.conditioning.base import Conditioner, Conditioning, Facts
from duotone.engine.model.blocks import Embedding
from duotone.engine.model.unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class ClipText:
    """A pretrained CLIP text encoder, frozen, and its tokenizer."""

    kind = "text"
    port = "tokens"

    encoder: str = "openai/clip-vit-base-patch32"
    """Name on the Hugging Face hub, or a folder holding model and tokenizer."""
    dropout: float = 0.1
    """Share of captions replaced by the null condition (no token) in training."""

    def build(self, network: UNetConfig, facts: Facts) -> "TextConditioner":
        from transformers import AutoTokenizer, CLIPTextModel

        tokenizer, encoder = loaded(self.encoder, AutoTokenizer, CLIPTextModel)
        length = encoder.config.max_position_embeddings
        return TextConditioner(encoder, HubTokens(tokenizer, length), self.dropout, network, frozen=True)


@dataclass(frozen=True, kw_only=True)
class EncoderText:
    """Any frozen text encoder that transformers' AutoModelForTextEncoding knows (T5, BERT, RoBERTa ...), and its tokenizer."""

    kind = "text"
    port = "tokens"

    encoder: str = "google-t5/t5-base"
    """Name on the Hugging Face hub, or a folder holding model and tokenizer."""
    length: int = 77
    """Maximum number of tokens in a caption; the rest is cut."""
    dropout: float = 0.1
    """Share of captions replaced by the null condition (no token) in training."""

    def build(self, network: UNetConfig, facts: Facts) -> "TextConditioner":
        at_least("conditioning: EncoderText.length", self.length, 2)
        from transformers import AutoModelForTextEncoding, AutoTokenizer

        tokenizer, encoder = loaded(self.encoder, AutoTokenizer, AutoModelForTextEncoding)
        most = most_tokens(encoder)
        if most is not None and self.length > most:
            raise Refused(
                f"conditioning: EncoderText.length = {self.length}: {self.encoder} takes {most} tokens; give that many or fewer"
            )
        tokens = HubTokens(tokenizer, self.length)
        return TextConditioner(encoder, tokens, self.dropout, network, frozen=True, sees_mask=True)


def most_tokens(encoder: nn.Module) -> int | None:
    """The most tokens that an encoder's position table has rows for; None if it has no table (T5, DeBERTa) and takes any length."""
    rows = getattr(encoder.config, "max_position_embeddings", None)
    for table in encoder.modules():
        if isinstance(table, nn.Embedding) and table.num_embeddings == rows:
            # RoBERTa's positions start at the row after the padding's.
            return rows if table.padding_idx is None else rows - table.padding_idx - 1
    return None


class EncoderAbsent(Refused):
    """A text encoder that is neither stored locally nor reachable on the hub."""


def loaded(name: str, tokenizer_class: type, encoder_class: type) -> tuple:
    """A tokenizer and an encoder from a folder or the hub; raises EncoderAbsent if they cannot be loaded."""
    # Local files first: without a network, asking the hub would wait for a timeout.
    with contextlib.suppress(OSError, ValueError):
        return tuple(kind.from_pretrained(name, local_files_only=True) for kind in (tokenizer_class, encoder_class))
    try:
        return tokenizer_class.from_pretrained(name), encoder_class.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise EncoderAbsent(
            f"text encoder {name!r} cannot be loaded ({reason}): set its encoder (conditioning.0.encoder for the first "
            "condition) to a folder with a text model and its tokenizer, or to a name on the hub that can be reached from here"
        ) from None


@dataclass(frozen=True, kw_only=True)
class ByteText:
    """A small CLIP text model over bytes, trained with the network; it needs no download."""

    kind = "text"
    port = "tokens"

    width: int = 64
    """Width of its tokens; the network's context_width must be the same."""
    layers: int = 2
    """Transformer layers."""
    heads: int = 4
    """Attention heads."""
    length: int = 64
    """Maximum number of bytes in a caption, including a mark at either end; the rest is cut."""
    pooled: bool = True
    """Also add the mean of a caption's tokens to the time embedding, so that the caption reaches every block."""
    dropout: float = 0.1
    """Share of captions replaced by the null condition (no token) in training."""

    def build(self, network: UNetConfig, facts: Facts) -> "TextConditioner":
        for name in ("width", "layers", "heads"):
            at_least(f"conditioning: ByteText.{name}", getattr(self, name), 1)
        at_least("conditioning: ByteText.length", self.length, 2)  # its two marks
        if self.width % self.heads:
            raise Refused(f"conditioning: ByteText.heads = {self.heads} does not divide its width of {self.width}")
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(
            vocab_size=ByteTokens.FIRST_BYTE + 256,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.length,
            pad_token_id=ByteTokens.PAD,
            bos_token_id=ByteTokens.BEGIN,
            eos_token_id=ByteTokens.END,
        )
        encoder = CLIPTextModel(config)
        return TextConditioner(
            encoder, ByteTokens(self.length), self.dropout, network, frozen=False, pooled=self.pooled
        )


class ByteTokens:
    """Captions as UTF-8 bytes between a begin and an end mark, padded to a fixed length."""

    PAD, BEGIN, END, FIRST_BYTE = 0, 1, 2, 3

    def __init__(self, length: int):
        self.length = length

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        ids_NM = torch.full((len(captions), self.length), self.PAD, dtype=torch.int64)
        for row, caption in zip(ids_NM, captions):
            data = caption.strip().encode()
            if len(data) > self.length - 2:
                warn_cut(caption, data[self.length - 2 :].decode(errors="ignore"))
            marks = [self.BEGIN, *(self.FIRST_BYTE + byte for byte in data[: self.length - 2]), self.END]
            row[: len(marks)] = torch.tensor(marks)
        return {"ids_NM": ids_NM, "mask_NM": ids_NM != self.PAD}


class HubTokens:
    """Captions through an encoder's own tokenizer, padded to a fixed length; the mask ends with the end mark."""

    def __init__(self, tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        captions = [caption.strip() for caption in captions]
        whole = self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]
        for caption, ids in zip(captions, whole):
            if len(ids) > self.length:
                warn_cut(caption, self.tokenizer.decode(ids[self.length - 1 : -1]))
        out = self.tokenizer(
            captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return {"ids_NM": out["input_ids"], "mask_NM": out["attention_mask"].bool()}


class CaptionCut(UserWarning):
    """A caption was longer than the text encoder takes."""


def warn_cut(caption: str, cut: str) -> None:
    told = f"caption {caption[:40]!r}... is longer than the text encoder takes; cut: {cut!r}"
    warnings.warn(told, CaptionCut, stacklevel=4)


class TextConditioner(Conditioner):
    """Tokens of a text encoder's last layer; the null condition is no token: attention to it gives exactly zero."""

    kind, keyword = "text", "prompts"
    placeholder = ""

    def __init__(
        self,
        encoder: nn.Module,
        tokens,
        dropout: float,
        network: UNetConfig,
        *,
        frozen: bool,
        pooled: bool = False,
        sees_mask: bool = False,
    ):
        super().__init__()
        width = encoder.config.hidden_size
        if width != network.context_width:
            raise Refused(
                f"model.context_width = {network.context_width}, but the text encoder's tokens are {width} wide"
            )
        self.tokens, self.dropout, self.frozen = tokens, dropout, frozen
        # CLIP is causal, so padding after a caption does not change its tokens. Other encoders would attend to the padding.
        self.sees_mask = sees_mask
        self.pool = Embedding(width, network.embedding_width) if pooled else None
        if frozen:
            # In a tuple, so that nn.Module does not register it: neither optimizer, checkpoint nor export then holds it.
            self.held = (encoder.requires_grad_(False).eval(),)
        else:
            self.encoder = encoder

    @property
    def frozen_modules(self) -> tuple[nn.Module, ...]:
        return getattr(self, "held", ())

    def _apply(self, fn, recurse: bool = True):
        for encoder in self.frozen_modules:
            encoder._apply(fn)
        return super()._apply(fn, recurse)

    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        return self.tokens(batch.captions)

    def of_values(self, values: list[str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        for value in values:
            if not isinstance(value, str):
                raise Refused(f"prompt {value!r} is not text: give strings")
            if any("\ud800" <= character <= "\udfff" for character in value):
                # Python reads bytes of an argument that are not UTF-8 as surrogates, which no encoder takes.
                raise Refused(f"prompt {value!r} is not valid UTF-8: write it in UTF-8")
        return self.tokens(values)

    def encode(self, tensors: dict[str, Tensor]) -> Tensor:
        if not self.frozen:
            return self.encoder(input_ids=tensors["ids_NM"]).last_hidden_state
        masks = {"attention_mask": tensors["mask_NM"].long()} if self.sees_mask else {}
        with torch.no_grad():
            return self.held[0](input_ids=tensors["ids_NM"], **masks).last_hidden_state

    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        tokens_NMD = self.encode(tensors)
        tokens_NMD = torch.where(keep_N[:, None, None], tokens_NMD, torch.zeros_like(tokens_NMD))
        mask_NM = tensors["mask_NM"]
        vector_NE = None if self.pool is None else self.pool(masked_mean(tokens_NMD, mask_NM))
        # The mask too: beside another condition's tokens, zero keys would still take a share of the attention, which would
        # give away the dropped caption's length.
        return Conditioning(vector_NE=vector_NE, tokens_NMD=tokens_NMD, mask_NM=mask_NM & keep_N[:, None])


def masked_mean(tokens_NMD: Tensor, mask_NM: Tensor) -> Tensor:
    """The mean of each row's real tokens, (N, D)."""
    weight_NM1 = mask_NM[:, :, None].to(tokens_NMD.dtype)
    return (tokens_NMD * weight_NM1).sum(1) / weight_NM1.sum(1)
