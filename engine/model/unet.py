"""The UNet: one network for diffusers' UNet2DModel and UNet2DConditionModel, with their parameter names.

N images, C channels, H x W pixels, M condition tokens, D condition width, E embedding width.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from duotone.data.refusal import Refused, at_least, share
from duotone.engine.model.blocks import (
    Downsample,
    Embedding,
    EmbeddingLinear,
    EndConv,
    GroupNormSiLU,
    ResBlock,
    SelfAttention,
    Transformer,
    Upsample,
    repeated,
    sinusoid,
)

AttentionKind = Literal["none", "self", "cross"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a UNet; levels are listed from full resolution down."""

    channels: tuple[int, ...] = (128, 128, 256, 384, 384)
    """Width of each level."""
    attention: tuple[AttentionKind, ...] = ("none", "cross", "cross", "cross", "cross")
    """Per level: none, self (attention over pixels) or cross (transformer layers that also read the tokens)."""
    middle: Literal["none", "self", "cross", "single", "absent"] = "cross"
    """The middle block's attention; single: one residual block and no attention; absent: no middle block at all."""
    heads: tuple[int, ...] = (4, 4, 4, 4, 4)
    """Attention heads of each level; the middle block has the last level's number."""
    blocks: tuple[int, ...] = (2, 2, 2, 2, 2)
    """Residual blocks of each level on the way down; there is one more on the way up."""
    depth: tuple[int, ...] = (1, 1, 1, 1, 1)
    """Transformer layers of each cross level; the middle block has the last level's number."""
    in_channels: int = 3
    """Channels of the image."""
    extra_channels: int = 0
    """Channels that an image condition adds to the input."""
    out_channels: int = 3
    """Channels of the prediction."""
    context_width: int = 512
    """Width of the condition tokens (512: CLIP ViT-B/32)."""
    groups: int = 32
    """Groups of every group norm."""
    eps: float = 1e-5
    """Epsilon of all group norms except the transformers', which have 1e-6."""
    film: bool = False
    """The embedding scales and shifts (FiLM) instead of being added."""
    film_shared: bool = False
    """One projection of the embedding for all blocks, each of which takes as many scales and shifts as it has channels."""
    dropout: float = 0.0
    """Dropout inside residual blocks; unlike all other random draws, it depends on how a batch is divided among ranks."""
    down_pads_ends: bool = False
    """Downsampling pads the image with zeros only at the right and bottom, as in Ho et al. 2020's networks."""
    linear_projection: bool = False
    """Transformers project by linear layers instead of 1 x 1 convolutions."""
    middle_norm: bool = True
    """The middle's self-attention begins with a group norm."""
    time_width: int | None = None
    """Width of the embedding; by default four times the first level."""
    time_flip: bool = True
    """Cosines before sines in the sinusoid of the time."""
    time_shift: float = 0.0
    """Shift of the sinusoid's frequencies."""
    zero_init: bool = True
    """The last layers of residual branches and of the network start at zero, so that residual blocks start as their skip alone."""

    def build(self) -> "UNet":
        self.check()
        return UNet(self)

    @property
    def embedding_width(self) -> int:
        return self.time_width or 4 * self.channels[0]

    @property
    def reads_tokens(self) -> bool:
        """Whether any level attends to a condition's tokens."""
        return "cross" in (*self.attention, self.middle)

    def check(self) -> None:
        """Raises Refused, naming the field, if the network cannot be built."""
        levels = len(self.channels)
        for name in ("attention", "heads", "blocks", "depth"):
            if len(getattr(self, name)) != levels:
                raise Refused(
                    f"model.{name} has {len(getattr(self, name))} entries and model.channels {levels}: give one per level"
                )
        for name in ("in_channels", "out_channels", "context_width", "groups"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.extra_channels", self.extra_channels, 0)
        at_least("model.time_width", 1 if self.time_width is None else self.time_width, 1)
        for name in ("channels", "heads", "blocks", "depth"):
            if min(getattr(self, name)) < 1:
                raise Refused(f"model.{name} = {getattr(self, name)}: every entry must be at least 1")
        for width, heads, kind in zip(self.channels, self.heads, self.attention):
            if width % self.groups:
                raise Refused(f"model.groups = {self.groups} does not divide a width of model.channels: {width}")
            if kind != "none" and width % heads:
                raise Refused(f"model.heads = {heads} does not divide the width {width} of its level")
        if self.middle in ("self", "cross") and self.channels[-1] % self.heads[-1]:
            raise Refused(f"model.heads = {self.heads[-1]} does not divide the width {self.channels[-1]} of the middle")
        if self.film_shared and not self.film:
            raise Refused("model.film_shared shares FiLM's projection: set model.film too, or leave film_shared off")
        share("model.dropout", self.dropout, below_one=True)

    @property
    def shrink(self) -> int:
        """The factor by which the last level's sides are smaller than the image's."""
        return 2 ** (len(self.channels) - 1)


class Level(nn.Module):
    """One level on the way down or up: residual blocks, each with its attention, then a change of resolution."""

    def __init__(self, config: UNetConfig, index: int, widths: list[int]):
        super().__init__()
        width = config.channels[index]
        self.resnets = nn.ModuleList([res_block(config, w, width) for w in widths])
        kind = config.attention[index]
        if kind != "none":
            self.attentions = nn.ModuleList([attention_block(config, kind, index) for _ in widths])

    def block(self, i: int, x_NCHW: Tensor, embedding_NE: Tensor, context, mask_NM, skip_NCHW=None) -> Tensor:
        x_NCHW = self.resnets[i](x_NCHW, embedding_NE, skip_NCHW)
        return attended(self.attentions[i], x_NCHW, context, mask_NM) if hasattr(self, "attentions") else x_NCHW


class DownLevel(Level):
    def __init__(self, config: UNetConfig, index: int):
        width, before = config.channels[index], config.channels[max(index - 1, 0)]
        super().__init__(config, index, [before] + [width] * (config.blocks[index] - 1))
        if index < len(config.channels) - 1:
            self.downsamplers = nn.ModuleList([Downsample(width, pads_ends=config.down_pads_ends)])


class UpLevel(Level):
    def __init__(self, config: UNetConfig, index: int):
        channels, count = config.channels, config.blocks[index] + 1
        below, above = channels[min(index + 1, len(channels) - 1)], channels[max(index - 1, 0)]
        entering = [below] + [channels[index]] * (count - 1)
        skips = [channels[index]] * (count - 1) + [above]
        super().__init__(config, index, [a + b for a, b in zip(entering, skips)])
        if index > 0:
            self.upsamplers = nn.ModuleList([Upsample(channels[index])])


class Middle(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.channels[-1]
        self.resnets = nn.ModuleList(
            [res_block(config, width, width) for _ in range(1 if config.middle == "single" else 2)]
        )
        if config.middle in ("self", "cross"):
            self.attentions = nn.ModuleList([attention_block(config, config.middle, -1)])

    def forward(self, x_NCHW: Tensor, embedding_NE: Tensor, context, mask_NM) -> Tensor:
        x_NCHW = self.resnets[0](x_NCHW, embedding_NE)
        if hasattr(self, "attentions"):
            x_NCHW = attended(self.attentions[0], x_NCHW, context, mask_NM)
        return x_NCHW if len(self.resnets) == 1 else self.resnets[1](x_NCHW, embedding_NE)


def res_block(config: UNetConfig, width: int, out_width: int) -> ResBlock:
    return ResBlock(
        width,
        out_width,
        config.embedding_width,
        groups=config.groups,
        eps=config.eps,
        film=config.film,
        shared=config.film_shared,
        dropout=config.dropout,
    )


def attention_block(config: UNetConfig, kind: str, index: int) -> nn.Module:
    width, heads = config.channels[index], config.heads[index]
    if kind == "self":
        groups = config.groups if index >= 0 or config.middle_norm else None
        return SelfAttention(width, heads, groups=groups, eps=config.eps)
    return Transformer(
        width,
        heads,
        context_width=config.context_width,
        depth=config.depth[index],
        groups=config.groups,
        linear=config.linear_projection,
    )


def attended(block: nn.Module, x_NCHW: Tensor, context, mask_NM: Tensor | None, *copies: int) -> Tensor:
    """An attention block's result. If `context` is an iterator over keys and values, the block is given those of its own layers.

    They are taken here because a compiled block cannot draw from an iterator.
    """
    if isinstance(context, Iterator):
        own = len(block.transformer_blocks) if isinstance(block, Transformer) else 0
        context = tuple(itertools.islice(context, own))
    return block(x_NCHW, context, mask_NM, *copies)


def for_copies(skips: list[Tensor], condition: tuple, copies: int) -> tuple[list[Tensor], tuple]:
    """Skips and condition for the blocks after the copies part; tokens and mask already have the rows of all copies."""
    embedding_NE, *tokens_mask = condition
    return [repeated(skip, copies) for skip in skips], (repeated(embedding_NE, copies), *tokens_mask)


class UNet(nn.Module):
    """Predicts F_NCHW from the scaled noisy image, the time and the condition's three ports."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        levels = range(len(config.channels))
        self.conv_in = EndConv(config.in_channels + config.extra_channels, config.channels[0], 3, padding=1)
        self.time_embedding = Embedding(config.channels[0], config.embedding_width)
        self.film_projection = (
            EmbeddingLinear(config.embedding_width, 2 * max(config.channels)) if config.film_shared else None
        )
        self.down_blocks = nn.ModuleList([DownLevel(config, i) for i in levels])
        self.mid_block = None if config.middle == "absent" else Middle(config)
        self.up_blocks = nn.ModuleList([UpLevel(config, i) for i in reversed(levels)])
        self.conv_norm_out = GroupNormSiLU(config.groups, config.channels[0], config.eps)
        self.conv_out = EndConv(config.channels[0], config.out_channels, 3, padding=1)
        if config.zero_init:
            self.zero_residual_branches()

    def zero_residual_branches(self) -> None:
        ends = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResBlock):
                ends.append(module.conv2)
            elif isinstance(module, Transformer):
                ends.append(module.proj_out)
            elif isinstance(module, SelfAttention):
                ends.append(module.to_out[0])
        for layer in ends:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def pad_ends(self, padded: bool) -> None:
        """Sets whether the first and last convolution pad the image's channels to a multiple of eight."""
        self.conv_in.padded_to = self.conv_out.padded_to = 8 if padded else 1

    def embed(self, time_N: Tensor, vector_NE: Tensor | None) -> Tensor:
        """SiLU of the time embedding plus the vector condition, (N, E), which every residual block projects.

        If the projection is shared, it is done here, once: the result is scales and shifts for the widest block, (N, 2C).
        """
        config = self.config
        waves = sinusoid(time_N, config.channels[0], flip=config.time_flip, shift=config.time_shift)
        embedding_NE = self.time_embedding(waves.to(self.conv_in.weight.dtype))
        embedding_NE = F.silu(embedding_NE if vector_NE is None else embedding_NE + vector_NE)
        return embedding_NE if self.film_projection is None else self.film_projection(embedding_NE)

    def run(self, block, *inputs):
        """Runs a block, to be recomputed in the backward pass if gradient checkpointing is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(
        self,
        x_NCHW: Tensor,
        time_N: Tensor,
        vector_NE: Tensor | None = None,
        tokens_NMD: Tensor | Iterator | None = None,
        mask_NM: Tensor | None = None,
        *,
        copies: int = 1,
    ) -> Tensor:
        """`tokens_NMD` are condition tokens, or an iterator over the cross-attentions' keys and values in order.

        With `copies`, tokens and mask have that many times N rows, and so has the result; the layers before the first
        cross-attention are computed once for all copies.
        """
        condition = (self.embed(time_N, vector_NE), tokens_NMD, mask_NM)
        x_NCHW = x_NCHW.to(self.conv_in.weight.dtype, memory_format=torch.channels_last)
        x_NCHW, skips, condition = self.down(self.conv_in(x_NCHW), condition, copies)
        if self.mid_block is not None:
            x_NCHW = self.run(self.mid_block, x_NCHW, *condition)
        x_NCHW = self.up(x_NCHW, skips, condition)
        return self.conv_out(self.conv_norm_out(x_NCHW))

    def down(self, x_NCHW: Tensor, condition: tuple, copies: int) -> tuple[Tensor, list[Tensor], tuple]:
        skips = [x_NCHW]
        for level, kind in zip(self.down_blocks, self.config.attention):
            for i in range(len(level.resnets)):
                if kind == "cross" and copies > 1:
                    x_NCHW, skips, condition = self.parted(level, x_NCHW, skips, condition, copies)
                    copies = 1
                else:
                    x_NCHW = self.run(level.block, i, x_NCHW, *condition)
                skips.append(x_NCHW)
            if hasattr(level, "downsamplers"):
                x_NCHW = level.downsamplers[0](x_NCHW)
                skips.append(x_NCHW)
        return repeated(x_NCHW, copies), *for_copies(skips, condition, copies)

    def parted(self, level: Level, x_NCHW: Tensor, skips: list[Tensor], condition: tuple, copies: int) -> tuple:
        """Runs the first block that reads tokens, in whose cross-attention the copies part."""
        embedding_NE, *tokens_mask = condition
        x_NCHW = attended(level.attentions[0], level.resnets[0](x_NCHW, embedding_NE), *tokens_mask, copies)
        return x_NCHW, *for_copies(skips, condition, copies)

    def up(self, x_NCHW: Tensor, skips: list[Tensor], condition: tuple) -> Tensor:
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x_NCHW = self.run(level.block, i, x_NCHW, *condition, skips.pop())
            if hasattr(level, "upsamplers"):
                x_NCHW = level.upsamplers[0](x_NCHW, skips[-1].shape[2:])
        return x_NCHW

    def cross_attentions(self) -> Iterator[nn.Module]:
        """Every cross-attention, in the order in which forward runs them."""
        middle = [] if self.mid_block is None else [self.mid_block]
        for block in [*self.down_blocks, *middle, *self.up_blocks]:
            for transformer in getattr(block, "attentions", []):
                if isinstance(transformer, Transformer):
                    yield from (layer.attn2 for layer in transformer.transformer_blocks)
