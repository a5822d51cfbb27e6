"""The parts of the UNet, under the parameter names of diffusers, with channels-last activations throughout.

N images, C channels, H x W pixels, L image tokens (H * W), M condition tokens, D condition width, E embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duotone.kernels.attention import attention
from duotone.kernels.group_norm_silu import group_norm_silu, joined_group_norm_silu


def tokens_of(x_NCHW: Tensor) -> Tensor:
    """The image as tokens_NLC: a view, since activations are channels-last."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def image_of(tokens_NLC: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens back as a channels-last image of this height and width: a view."""
    return tokens_NLC.unflatten(1, size).permute(0, 3, 1, 2)


def repeated(x: Tensor, copies: int) -> Tensor:
    """All rows, `copies` times one after the other; the tensor itself for one copy."""
    return x if copies == 1 else torch.cat([x] * copies)


def sinusoid(time_N: Tensor, width: int, *, flip: bool = True, shift: float = 0.0) -> Tensor:
    """Sinusoidal embedding of a time, (N, width) fp32; Vaswani et al. 2017, section 3.5, cosines first when `flip`."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=time_N.device) / (half - shift)
    angle = time_N.float()[:, None] * torch.exp(-math.log(10_000) * exponent)[None, :]
    first, second = (angle.cos(), angle.sin()) if flip else (angle.sin(), angle.cos())
    return F.pad(torch.cat([first, second], dim=1), (0, width % 2))


class EmbeddingLinear(nn.Linear):
    """A linear layer over the time or a condition; a class of its own so that Muon can leave it to AdamW."""


class Embedding(nn.Module):
    """Linear, SiLU, linear, over the time or a vector condition."""

    def __init__(self, width: int, embedding_width: int):
        super().__init__()
        self.linear_1 = EmbeddingLinear(width, embedding_width)
        self.linear_2 = EmbeddingLinear(embedding_width, embedding_width)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x_ND)))


class GroupNormSiLU(nn.GroupNorm):
    """Group norm with, on request, an added vector, FiLM and SiLU, in one kernel."""

    in_turns = False
    """Whether large maps take one launch instead of two (duotone.kernels.turns)."""
    joins_skips = False
    """Whether the norm's kernel concatenates an image and its skip itself, reading both in place."""

    def forward(self, x_NCHW: Tensor, *, silu: bool = True, **modulation: Tensor) -> Tensor:
        affine = (self.weight, self.bias, self.num_groups, self.eps)
        return group_norm_silu(x_NCHW, *affine, silu=silu, in_turns=self.in_turns, **modulation)

    def joining(self, x_NCHW: Tensor, skip_NCHW: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x and its skip concatenated along C, and the concatenation; without a skip, of x alone."""
        if skip_NCHW is not None and self.joins_skips:
            affine = (self.weight, self.bias, self.num_groups, self.eps)
            return joined_group_norm_silu(x_NCHW, skip_NCHW, *affine, in_turns=self.in_turns)
        if skip_NCHW is not None:
            x_NCHW = Joined.apply(x_NCHW, skip_NCHW)
        return self(x_NCHW), x_NCHW


class Joined(torch.autograd.Function):
    """x and skip concatenated along C, each with a dense gradient: slices of one gradient would be copied before their use."""

    @staticmethod
    def forward(ctx, x_NCHW: Tensor, skip_NCHW: Tensor) -> Tensor:
        ctx.border = x_NCHW.shape[1]
        return torch.cat([x_NCHW, skip_NCHW], dim=1)

    @staticmethod
    def backward(ctx, gradient_NCHW: Tensor) -> tuple[Tensor, ...]:
        parts = gradient_NCHW.tensor_split([ctx.border], dim=1)
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)


class ConvBeforeNorm(nn.Conv2d):
    """A convolution that leaves its bias to the group norm after it, which can add a vector in its own pass.

    Added separately, the bias would cost another read and write of the whole map, and another sum over it in the backward pass.
    """

    def forward(self, x_NCHW: Tensor, add_NC: Tensor | None) -> tuple[Tensor, Tensor]:
        """The convolution without its bias, and the vector (N, C) that remains to be added to it."""
        left_NC = self.bias.expand(len(x_NCHW), -1) if add_NC is None else add_NC + self.bias
        return self._conv_forward(x_NCHW, self.weight, None), left_NC


class ResBlock(nn.Module):
    """Two norm-SiLU-convolutions around a skip; the embedding is added between them, or scales and shifts (FiLM).

    If the projection is shared, the block is given the scales and shifts themselves and takes as many of each as it is wide.
    """

    def __init__(self, width: int, out_width: int, embedding_width: int, *, groups, eps, film, shared, dropout):
        super().__init__()
        self.film, self.out_width = film, out_width
        self.norm1 = GroupNormSiLU(groups, width, eps)
        self.conv1 = ConvBeforeNorm(width, out_width, 3, padding=1)
        modulated = 2 * out_width if film else out_width
        self.time_emb_proj = None if shared else EmbeddingLinear(embedding_width, modulated)
        self.norm2 = GroupNormSiLU(groups, out_width, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width, out_width, 1) if width != out_width else None

    def modulation(self, silu_embedding_NE: Tensor) -> dict[str, Tensor]:
        projected = silu_embedding_NE if self.time_emb_proj is None else self.time_emb_proj(silu_embedding_NE)
        if not self.film:
            return {"add_NC": projected}
        scale_NC, shift_NC = projected.chunk(2, dim=1)
        return {"scale_NC": scale_NC[:, : self.out_width], "shift_NC": shift_NC[:, : self.out_width]}

    def forward(self, x_NCHW: Tensor, silu_embedding_NE: Tensor, skip_NCHW: Tensor | None = None) -> Tensor:
        """On the way up the block also takes the skip; concatenated here, it is part of the block's compiled graph."""
        modulation = self.modulation(silu_embedding_NE)
        h, x_NCHW = self.norm1.joining(x_NCHW, skip_NCHW)
        h, add_NC = self.conv1(h, modulation.pop("add_NC", None))
        h = self.norm2(h, add_NC=add_NC, **modulation)
        h = self.conv2(self.dropout(h))
        return h + (x_NCHW if self.conv_shortcut is None else self.conv_shortcut(x_NCHW))


class Attention(nn.Module):
    """Multi-head attention over tokens; keys and values from `context_NMD` where given."""

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def keys_values(self, context_NMD: Tensor) -> tuple[Tensor, Tensor]:
        k_NMHD, v_NMHD = packed(self.heads, context_NMD, self.to_k, self.to_v)
        return k_NMHD, v_NMHD

    def forward(self, x_NLC: Tensor, context=None, mask_NM: Tensor | None = None) -> Tensor:
        """`context` is tokens_NMD, or keys and values already projected (they do not change between sampling steps)."""
        if context is None:
            q, k, v = packed(self.heads, x_NLC, self.to_q, self.to_k, self.to_v)
        else:
            (q,) = packed(self.heads, x_NLC, self.to_q)
            k, v = context if isinstance(context, tuple) else self.keys_values(context)
        return self.to_out[0](attention(q, k, v, mask_NM=mask_NM).flatten(2))


def packed(heads: int, x_NLC: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Several projections of the same tokens in one matrix product, split into heads: each (N, L, heads, head width)."""
    if len(layers) == 1:
        return (layers[0](x_NLC).unflatten(-1, (heads, -1)),)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(x_NLC, weight, bias).unflatten(-1, (len(layers), heads, -1)).unbind(2)


class SelfAttention(Attention):
    """Group norm and self-attention over the pixels of an image, with a residual (diffusers' attention block)."""

    def __init__(self, width: int, heads: int, *, groups: int | None, eps: float):
        super().__init__(width, heads, bias=True)
        self.group_norm = None if groups is None else GroupNormSiLU(groups, width, eps)

    def forward(self, x_NCHW: Tensor, context=None, mask_NM: Tensor | None = None) -> Tensor:
        h = x_NCHW if self.group_norm is None else self.group_norm(x_NCHW, silu=False)
        return x_NCHW + image_of(super().forward(tokens_of(h)), x_NCHW.shape[2:])


class GEGLU(nn.Module):
    """Gated GELU; Shazeer 2020, equation 5."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        hidden = 4 * width
        self.net = nn.ModuleList([GEGLU(width, hidden), nn.Dropout(0.0), nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a layer norm and with a residual."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width=context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x_NLC: Tensor, context, mask_NM: Tensor | None, copies: int = 1) -> Tensor:
        """With `copies`, context and mask have that many times N rows; up to the cross-attention all copies are computed as one."""
        x_NLC = repeated(x_NLC + self.attn1(self.norm1(x_NLC)), copies)
        x_NLC = x_NLC + self.attn2(self.norm2(x_NLC), context, mask_NM)
        return x_NLC + self.ff(self.norm3(x_NLC))


class Transformer(nn.Module):
    """Transformer layers over the pixels of an image; the projections before and after are linear, or 1 x 1 convolutions."""

    def __init__(self, width: int, heads: int, *, context_width: int, depth: int, groups: int, linear: bool):
        super().__init__()
        self.norm = GroupNormSiLU(groups, width, eps=1e-6)
        projection = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.proj_in = projection(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerLayer(width, heads, context_width) for _ in range(depth)])
        self.proj_out = projection(width, width)

    def project(self, layer: nn.Module, x_NLC: Tensor) -> Tensor:
        # A 1 x 1 convolution over channels-last pixels is a linear layer over tokens: same weights, no layout change.
        return F.linear(x_NLC, layer.weight.flatten(1), layer.bias)

    def forward(self, x_NCHW: Tensor, context=None, mask_NM: Tensor | None = None, copies: int = 1) -> Tensor:
        """`context` is tokens_NMD for every layer, or a tuple of keys and values, one pair per layer.

        With `copies`, context and mask have that many times N rows, and so has the result.
        """
        h = self.project(self.proj_in, tokens_of(self.norm(x_NCHW, silu=False)))
        x_NCHW = repeated(x_NCHW, copies)
        for i, layer in enumerate(self.transformer_blocks):
            h = layer(h, context[i] if isinstance(context, tuple) else context, mask_NM, copies)
            copies = 1
        return x_NCHW + image_of(self.project(self.proj_out, h), x_NCHW.shape[2:])


class EndConv(nn.Conv2d):
    """The first or last convolution of a network, which can be padded: an image has fewer channels than tensor cores want."""

    padded_to = 1
    """Channels are padded with zeros to a multiple of this; the result is the same."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        more_in, more_out = -self.in_channels % self.padded_to, -self.out_channels % self.padded_to
        if not more_in and not more_out:
            return super().forward(x_NCHW)
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
        x_NCHW = F.pad(x_NCHW, (0, 0, 0, 0, 0, more_in))
        y_NCHW = F.conv2d(x_NCHW, weight, F.pad(self.bias, (0, more_out)), padding=self.padding)
        return y_NCHW[:, : self.out_channels]


class Downsample(nn.Module):
    """A convolution of stride 2, with zero padding on all sides or only at the right and bottom (Ho et al. 2020's networks)."""

    def __init__(self, width: int, *, pads_ends: bool = False):
        super().__init__()
        self.pads_ends = pads_ends
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=0 if pads_ends else 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_NCHW, (0, 1, 0, 1)) if self.pads_ends else x_NCHW)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x_NCHW, size=size, mode="nearest"))
