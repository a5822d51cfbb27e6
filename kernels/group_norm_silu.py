"""y = silu(GroupNorm(x + add) * (1 + scale) + shift): x is read once and y written once where a slab fits on chip.

N images, C channels, H x W pixels, G groups. Statistics, scale and shift are fp32 whatever the image's type.
Wu and He 2018 (group normalisation), Perez et al. 2018 (FiLM), Elfwing et al. 2018 (SiLU).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from duotone.kernels.dispatch import (
    count_fallback,
    launch,
    require,
    require_same_device,
    runs_kernel,
    tl,
    triton,
    triton_op,
    wrap_triton,
)

NAME = "group_norm_silu"

# ---------------------------------------------------------------------------------------------------- definition


def group_norm_silu_reference(
    x_NCHW, weight_C, bias_C, groups, eps=1e-5, *, shift_NC=None, scale_NC=None, add_NC=None, silu=True
):
    """The definition in plain PyTorch: computed in fp32 (fp64 for fp64 images), returned in the image's type."""
    wide = torch.promote_types(x_NCHW.dtype, torch.float32)
    h_NCHW = x_NCHW.to(wide)
    if add_NC is not None:
        h_NCHW = h_NCHW + _per_channel(add_NC, wide)
    h_NCHW = F.group_norm(h_NCHW, groups, weight_C.to(wide), bias_C.to(wide), eps)
    h_NCHW = _film(h_NCHW, scale_NC, shift_NC, wide)
    y_NCHW = (F.silu(h_NCHW) if silu else h_NCHW).to(x_NCHW.dtype)
    return y_NCHW.contiguous(memory_format=memory_format_of(x_NCHW))


def _film(h_NCHW, scale_NC, shift_NC, wide):
    if scale_NC is not None and shift_NC is not None:
        return torch.addcmul(_per_channel(shift_NC, wide), h_NCHW, 1 + _per_channel(scale_NC, wide))
    if scale_NC is not None:
        return h_NCHW * (1 + _per_channel(scale_NC, wide))
    return h_NCHW if shift_NC is None else h_NCHW + _per_channel(shift_NC, wide)


def _per_channel(value_NC, dtype):
    return value_NC.to(dtype)[:, :, None, None]


def memory_format_of(x_NCHW):
    """Channels-last where the channel is the fastest axis, also for slices of such tensors."""
    return torch.channels_last if x_NCHW.stride(1) == 1 and x_NCHW.shape[1] > 1 else torch.contiguous_format


# --------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One shape worth testing and timing, and why."""

    name: str
    shape: tuple[int, int, int, int]
    groups: int
    why: str
    timed: bool = False
    modulated: bool = True


CASES = [
    Case("four_per_group", (2, 128, 8, 8), 32, "4 channels per group: Inductor's bf16 weight gradient was wrong here"),
    Case("odd_map", (2, 64, 7, 7), 8, "49 pixels: rows that fill no tile"),
    Case("one_image", (1, 64, 16, 16), 32, "one image: the sum over images has one term"),
    Case("group_is_channel", (2, 32, 8, 8), 32, "C = G: instance norm, and a weight gradient far from the bias's"),
    Case("one_group", (2, 24, 5, 6), 1, "G = 1: the whole image is one slab, and 24 channels fill no tile"),
    Case("three_per_group", (2, 96, 6, 6), 32, "C = 96 with 32 groups: 3 channels per group"),
    Case("ten_per_group", (1, 320, 4, 4), 32, "Stable Diffusion's 320 channels: 10 per group"),
    Case("one_pixel", (3, 64, 1, 1), 8, "a 1x1 map: variance over the group's channels alone"),
    Case("chunks", (2, 64, 40, 41), 32, "larger than one program holds: partial statistics merged, ragged last chunk"),
    Case("chunks_odd_groups", (1, 96, 45, 37), 32, "chunks with 3 channels per group"),
    Case("idle_lanes", (2, 192, 6, 6), 32, "several programs an image, each with lanes that are another's channels"),
    Case(
        "level_128",
        (64, 128, 128, 128),
        32,
        "the network's first level: most of its bytes",
        timed=True,
        modulated=False,
    ),
    Case("level_64", (64, 128, 64, 64), 32, "second level", timed=True, modulated=False),
    Case("level_32", (64, 256, 32, 32), 32, "third level", timed=True, modulated=False),
    Case("level_16", (64, 384, 16, 16), 32, "fourth level: 12 channels per group", timed=True, modulated=False),
    Case("level_8", (64, 384, 8, 8), 32, "the middle: many small slabs", timed=True, modulated=False),
    Case(
        "skip_128", (64, 256, 128, 128), 32, "first level after the skip's concatenation", timed=True, modulated=False
    ),
    Case(
        "latent_64",
        (8, 320, 64, 64),
        32,
        "Stable Diffusion's first level, published by others",
        timed=True,
        modulated=False,
    ),
    Case("film_32", (64, 256, 32, 32), 32, "every modulation at once", timed=True),
    Case("film_16", (64, 384, 16, 16), 32, "every modulation at once, on chip: the most registers", timed=True),
]

# --------------------------------------------------------------------------------------------------- device code
# A program owns whole groups: SPAN channels of one image, so that a row of a channels-last image is read in full lines.
# Signatures are grouped by subject: tensors, sizes, strides, switches, tile.
# R rows (pixels) of a tile, C channels of a program, G groups of a program, K chunks of rows.
# fmt: off


@triton.jit
def _fold(value_C, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Sum over the channels of each group."""
    if PER_GROUP * BLOCK_G == BLOCK_C:
        return tl.sum(tl.reshape(value_C, (BLOCK_G, PER_GROUP)), axis=1)
    else:
        member_CG = tl.arange(0, BLOCK_C)[:, None] // PER_GROUP == tl.arange(0, BLOCK_G)[None, :]
        return tl.sum(tl.where(member_CG, value_C[:, None], 0.0), axis=0)


@triton.jit
def _spread(value_G, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Give every channel its group's value."""
    if PER_GROUP * BLOCK_G == BLOCK_C:
        return tl.reshape(tl.broadcast_to(value_G[:, None], (BLOCK_G, PER_GROUP)), (BLOCK_C,))
    else:
        member_CG = tl.arange(0, BLOCK_C)[:, None] // PER_GROUP == tl.arange(0, BLOCK_G)[None, :]
        return tl.sum(tl.where(member_CG, value_G[None, :], 0.0), axis=1)


@triton.jit
def _offsets(row_R, channel_C, width, stride_h, stride_w, stride_c, FLAT: tl.constexpr):
    if FLAT:
        pixel_R = row_R * stride_w
    else:
        pixel_R = (row_R // width) * stride_h + (row_R % width) * stride_w
    return pixel_R[:, None] + channel_C[None, :] * stride_c


@triton.jit
def _per_image(pointer, image, stride, channel_C, real_C, PRESENT: tl.constexpr):
    if PRESENT:
        return tl.load(pointer + image * stride + channel_C, mask=real_C, other=0.0).to(tl.float32)
    else:
        return tl.zeros(channel_C.shape, tl.float32)


@triton.jit
def _affine(
    weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):
    """Normalised values times gain plus offset are the modulated ones."""
    factor_C = 1.0 + _per_image(scale, image, scale_n, channel_C, real_C, SCALE)
    weight_C = tl.load(weight + channel_C, mask=real_C, other=0.0).to(tl.float32)
    bias_C = tl.load(bias + channel_C, mask=real_C, other=0.0).to(tl.float32)
    offset_C = bias_C * factor_C + _per_image(shift, image, shift_n, channel_C, real_C, SHIFT)
    return weight_C * factor_C, offset_C


@triton.jit
def _forward_whole(
    x, weight, bias, add, scale, shift, y, mean, rstd,
    channels, groups, pixels, width, eps,
    x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, FLAT: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """One program keeps its slab on chip: mean, then centred squares, then the output, from one read."""
    image = tl.program_id(1).to(tl.int64)
    lane_C = tl.arange(0, BLOCK_C)
    channel_C = tl.program_id(0) * SPAN + lane_C
    real_C = (lane_C < SPAN) & (channel_C < channels)
    row_R = tl.arange(0, BLOCK_R)
    real_RC = (row_R < pixels)[:, None] & real_C[None, :]
    x_RC = tl.load(x + image * x_n + _offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT), mask=real_RC, other=0.0)
    add_C = _per_image(add, image, add_n, channel_C, real_C, ADD)

    count = pixels * PER_GROUP
    z_RC = tl.where(real_RC, x_RC.to(tl.float32) + add_C[None, :], 0.0)
    mean_G = _fold(tl.sum(z_RC, axis=0), PER_GROUP, BLOCK_C, BLOCK_G) / count
    mean_C = _spread(mean_G, PER_GROUP, BLOCK_C, BLOCK_G)
    centred_RC = tl.where(real_RC, z_RC - mean_C[None, :], 0.0)
    square_G = _fold(tl.sum(centred_RC * centred_RC, axis=0), PER_GROUP, BLOCK_C, BLOCK_G) / count
    # What rounding left in the mean: without it an image far from zero keeps an offset.
    left_G = _fold(tl.sum(centred_RC, axis=0), PER_GROUP, BLOCK_C, BLOCK_G) / count
    rstd_G = 1.0 / tl.sqrt(square_G - left_G * left_G + eps)

    gain_C, offset_C = _affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
    gain_C *= _spread(rstd_G, PER_GROUP, BLOCK_C, BLOCK_G)
    offset_C -= _spread(left_G, PER_GROUP, BLOCK_C, BLOCK_G) * gain_C
    value_RC = centred_RC * gain_C[None, :] + offset_C[None, :]
    if SILU:
        value_RC = value_RC * tl.sigmoid(value_RC)
    y_RC = y + image * y_n + row_R[:, None] * y_w + channel_C[None, :] * y_c
    tl.store(y_RC, value_RC.to(y.dtype.element_ty), mask=real_RC)

    lane_G = tl.arange(0, BLOCK_G)
    group_G = tl.program_id(0) * (SPAN // PER_GROUP) + lane_G
    real_G = (lane_G < SPAN // PER_GROUP) & (group_G < groups)
    tl.store(mean + image * groups + group_G, mean_G + left_G, mask=real_G)
    tl.store(rstd + image * groups + group_G, rstd_G, mask=real_G)


@triton.jit
def _forward_statistics(
    x, add, partial,
    channels, groups, pixels, width, rows, chunks,
    x_n, x_h, x_w, x_c, add_n,
    ADD: tl.constexpr, FLAT: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """Mean and centred squares of one chunk of rows, by Welford's update in every lane, merged once at the end."""
    image = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(1)
    lane_C = tl.arange(0, BLOCK_C)
    channel_C = tl.program_id(0) * SPAN + lane_C
    real_C = (lane_C < SPAN) & (channel_C < channels)
    last = tl.minimum(chunk * rows + rows, pixels)
    mean_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    square_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    count_R = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(chunk * rows, last, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_R = row_R < last
        real_RC = real_R[:, None] & real_C[None, :]
        from_RC = x + image * x_n + _offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT)
        x_RC = tl.load(from_RC, mask=real_RC, other=0.0)
        count_R += real_R.to(tl.float32)
        delta_RC = tl.where(real_RC, x_RC.to(tl.float32) - mean_RC, 0.0)
        mean_RC += delta_RC * (1.0 / tl.maximum(count_R, 1.0))[:, None]
        square_RC += delta_RC * tl.where(real_RC, x_RC.to(tl.float32) - mean_RC, 0.0)

    # Chan, Golub and LeVeque 1979: lanes into channels (adding `add`, which moves means only), channels into groups.
    # Every mean is taken twice, the second time of what is left, so that it is right to its last bit.
    number = (last - chunk * rows).to(tl.float32)
    mean_C = tl.sum(mean_RC * count_R[:, None], axis=0) / number
    mean_C += tl.sum((mean_RC - mean_C[None, :]) * count_R[:, None], axis=0) / number
    apart_RC = mean_RC - mean_C[None, :]
    square_C = tl.sum(square_RC + apart_RC * apart_RC * count_R[:, None], axis=0)
    mean_C += _per_image(add, image, add_n, channel_C, real_C, ADD)
    mean_G = _fold(tl.where(real_C, mean_C, 0.0), PER_GROUP, BLOCK_C, BLOCK_G) / PER_GROUP
    left_C = tl.where(real_C, mean_C - _spread(mean_G, PER_GROUP, BLOCK_C, BLOCK_G), 0.0)
    mean_G += _fold(left_C, PER_GROUP, BLOCK_C, BLOCK_G) / PER_GROUP
    apart_C = mean_C - _spread(mean_G, PER_GROUP, BLOCK_C, BLOCK_G)
    square_G = _fold(tl.where(real_C, square_C + apart_C * apart_C * number, 0.0), PER_GROUP, BLOCK_C, BLOCK_G)

    lane_G = tl.arange(0, BLOCK_G)
    group_G = tl.program_id(0) * (SPAN // PER_GROUP) + lane_G
    real_G = (lane_G < SPAN // PER_GROUP) & (group_G < groups)
    slot_G = partial + (image * chunks + chunk) * 2 * groups + group_G
    tl.store(slot_G, mean_G, mask=real_G)
    tl.store(slot_G + groups, square_G, mask=real_G)


@triton.jit
def _merged(
    partial, image, group_G, real_G, groups, pixels, rows, chunks, eps, PER_GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Mean and reciprocal deviation of each group from its chunks."""
    chunk_K = tl.arange(0, BLOCK_K)
    real_KG = (chunk_K < chunks)[:, None] & real_G[None, :]
    slot_KG = partial + (image * chunks + chunk_K)[:, None] * 2 * groups + group_G[None, :]
    mean_KG = tl.load(slot_KG, mask=real_KG, other=0.0)
    square_KG = tl.load(slot_KG + groups, mask=real_KG, other=0.0)
    number_K = tl.maximum(tl.minimum(pixels - chunk_K * rows, rows), 0).to(tl.float32) * PER_GROUP
    count = pixels * PER_GROUP
    mean_G = tl.sum(mean_KG * number_K[:, None], axis=0) / count
    mean_G += tl.sum((mean_KG - mean_G[None, :]) * number_K[:, None], axis=0) / count
    apart_KG = mean_KG - mean_G[None, :]
    square_G = tl.sum(square_KG + apart_KG * apart_KG * number_K[:, None], axis=0)
    return mean_G, 1.0 / tl.sqrt(square_G / count + eps)


@triton.jit
def _last_first():
    """Image and chunk of the second of two launches: what the first one read last is still in the cache."""
    return (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def _forward_apply(
    x, weight, bias, add, scale, shift, partial, y, mean, rstd,
    channels, groups, pixels, width, rows, chunks, eps,
    x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, FLAT: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Normalise one chunk of rows with the statistics of all chunks."""
    image, chunk = _last_first()
    lane_C = tl.arange(0, BLOCK_C)
    channel_C = tl.program_id(0) * SPAN + lane_C
    real_C = (lane_C < SPAN) & (channel_C < channels)
    lane_G = tl.arange(0, BLOCK_G)
    group_G = tl.program_id(0) * (SPAN // PER_GROUP) + lane_G
    real_G = (lane_G < SPAN // PER_GROUP) & (group_G < groups)
    mean_G, rstd_G = _merged(partial, image, group_G, real_G, groups, pixels, rows, chunks, eps, PER_GROUP, BLOCK_K)
    if chunk == 0:
        tl.store(mean + image * groups + group_G, mean_G, mask=real_G)
        tl.store(rstd + image * groups + group_G, rstd_G, mask=real_G)

    gain_C, offset_C = _affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
    gain_C *= _spread(rstd_G, PER_GROUP, BLOCK_C, BLOCK_G)
    centre_C = _spread(mean_G, PER_GROUP, BLOCK_C, BLOCK_G)
    centre_C -= _per_image(add, image, add_n, channel_C, real_C, ADD)
    last = tl.minimum(chunk * rows + rows, pixels)
    for first in range(chunk * rows, last, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_RC = (row_R < last)[:, None] & real_C[None, :]
        from_RC = x + image * x_n + _offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT)
        x_RC = tl.load(from_RC, mask=real_RC, other=0.0)
        value_RC = (x_RC.to(tl.float32) - centre_C[None, :]) * gain_C[None, :] + offset_C[None, :]
        if SILU:
            value_RC = value_RC * tl.sigmoid(value_RC)
        y_RC = y + image * y_n + row_R[:, None] * y_w + channel_C[None, :] * y_c
        tl.store(y_RC, value_RC.to(y.dtype.element_ty), mask=real_RC)


@triton.jit
def _through_silu(dy_RC, normal_RC, gain_C, offset_C, SILU: tl.constexpr):
    """Gradient at the activation's input, which is recomputed from the normalised values."""
    if SILU:
        value_RC = normal_RC * gain_C[None, :] + offset_C[None, :]
        gate_RC = tl.sigmoid(value_RC)
        return dy_RC * gate_RC * (1.0 + value_RC * (1.0 - gate_RC))
    else:
        return dy_RC


@triton.jit
def _small_gradients(
    weight, bias, scale, per_image, dadd, dscale, dshift, image, channels, channel_C, real_C,
    flow_C, twist_C, drift_C, common_C, tilt_C, rstd_C, gain_C, pixels, scale_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):
    """Store what one image contributes to every per-channel gradient, from its three sums over pixels.

    flow = sum of dv, twist = sum of dv * normal, drift = sum of normal; common and tilt are the group's means in dx.
    """
    factor_C = 1.0 + _per_image(scale, image, scale_n, channel_C, real_C, SCALE)
    row_C = per_image + image * 2 * channels + channel_C
    tl.store(row_C, factor_C * twist_C, mask=real_C)
    tl.store(row_C + channels, factor_C * flow_C, mask=real_C)
    slot_C = image * channels + channel_C
    if SHIFT:
        tl.store(dshift + slot_C, flow_C.to(dshift.dtype.element_ty), mask=real_C)
    if SCALE:
        weight_C = tl.load(weight + channel_C, mask=real_C, other=0.0).to(tl.float32)
        bias_C = tl.load(bias + channel_C, mask=real_C, other=0.0).to(tl.float32)
        dscale_C = weight_C * twist_C + bias_C * flow_C
        tl.store(dscale + slot_C, dscale_C.to(dscale.dtype.element_ty), mask=real_C)
    if ADD:
        dadd_C = rstd_C * (gain_C * flow_C - pixels * common_C - drift_C * tilt_C)
        tl.store(dadd + slot_C, dadd_C.to(dadd.dtype.element_ty), mask=real_C)


@triton.jit
def _backward_whole(
    x, dy, weight, bias, add, scale, shift, mean, rstd, dx, per_image, dadd, dscale, dshift,
    channels, groups, pixels, width,
    x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, dx_n, dx_w, dx_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, FLAT_DY: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """One program keeps x and dy of its slab on chip: the sums, then dx, from one read of each."""
    image = tl.program_id(1).to(tl.int64)
    lane_C = tl.arange(0, BLOCK_C)
    channel_C = tl.program_id(0) * SPAN + lane_C
    real_C = (lane_C < SPAN) & (channel_C < channels)
    row_R = tl.arange(0, BLOCK_R)
    real_RC = (row_R < pixels)[:, None] & real_C[None, :]
    x_RC = tl.load(x + image * x_n + _offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT), mask=real_RC, other=0.0)
    at_RC = dy + image * dy_n + _offsets(row_R, channel_C, width, dy_h, dy_w, dy_c, FLAT_DY)
    dy_RC = tl.load(at_RC, mask=real_RC, other=0.0)

    group_C = channel_C // PER_GROUP
    rstd_C = tl.load(rstd + image * groups + group_C, mask=real_C, other=0.0)
    centre_C = tl.load(mean + image * groups + group_C, mask=real_C, other=0.0)
    centre_C -= _per_image(add, image, add_n, channel_C, real_C, ADD)
    gain_C, offset_C = _affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
    normal_RC = tl.where(real_RC, (x_RC.to(tl.float32) - centre_C[None, :]) * rstd_C[None, :], 0.0)
    dv_RC = _through_silu(dy_RC.to(tl.float32), normal_RC, gain_C, offset_C, SILU)
    flow_C = tl.sum(dv_RC, axis=0)
    twist_C = tl.sum(dv_RC * normal_RC, axis=0)
    drift_C = flow_C
    if ADD:
        drift_C = tl.sum(normal_RC, axis=0)

    count = pixels * PER_GROUP
    common_G = _fold(gain_C * flow_C, PER_GROUP, BLOCK_C, BLOCK_G) / count
    tilt_G = _fold(gain_C * twist_C, PER_GROUP, BLOCK_C, BLOCK_G) / count
    common_C = _spread(common_G, PER_GROUP, BLOCK_C, BLOCK_G)
    tilt_C = _spread(tilt_G, PER_GROUP, BLOCK_C, BLOCK_G)
    value_RC = rstd_C[None, :] * (gain_C[None, :] * dv_RC - common_C[None, :] - normal_RC * tilt_C[None, :])
    dx_RC = dx + image * dx_n + row_R[:, None] * dx_w + channel_C[None, :] * dx_c
    tl.store(dx_RC, value_RC.to(dx.dtype.element_ty), mask=real_RC)
    _small_gradients(
        weight, bias, scale, per_image, dadd, dscale, dshift, image, channels, channel_C, real_C,
        flow_C, twist_C, drift_C, common_C, tilt_C, rstd_C, gain_C, pixels, scale_n, ADD, SCALE, SHIFT,
    )


@triton.jit
def _backward_sums(
    x, dy, weight, bias, add, scale, shift, mean, rstd, partial,
    channels, groups, pixels, width, rows, chunks,
    x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, FLAT_DY: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Per-channel sums over one chunk of rows: dv, dv * normal, and normal where `add` needs it."""
    image = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(1)
    lane_C = tl.arange(0, BLOCK_C)
    channel_C = tl.program_id(0) * SPAN + lane_C
    real_C = (lane_C < SPAN) & (channel_C < channels)
    group_C = channel_C // PER_GROUP
    rstd_C = tl.load(rstd + image * groups + group_C, mask=real_C, other=0.0)
    centre_C = tl.load(mean + image * groups + group_C, mask=real_C, other=0.0)
    centre_C -= _per_image(add, image, add_n, channel_C, real_C, ADD)
    gain_C, offset_C = _affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
    flow_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    twist_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    drift_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    last = tl.minimum(chunk * rows + rows, pixels)
    for first in range(chunk * rows, last, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_RC = (row_R < last)[:, None] & real_C[None, :]
        from_RC = x + image * x_n + _offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT)
        x_RC = tl.load(from_RC, mask=real_RC, other=0.0)
        at_RC = dy + image * dy_n + _offsets(row_R, channel_C, width, dy_h, dy_w, dy_c, FLAT_DY)
        dy_RC = tl.load(at_RC, mask=real_RC, other=0.0).to(tl.float32)
        normal_RC = tl.where(real_RC, (x_RC.to(tl.float32) - centre_C[None, :]) * rstd_C[None, :], 0.0)
        dv_RC = _through_silu(dy_RC, normal_RC, gain_C, offset_C, SILU)
        flow_RC += dv_RC
        twist_RC += dv_RC * normal_RC
        if ADD:
            drift_RC += normal_RC
    slot_C = partial + (image * chunks + chunk) * 3 * channels + channel_C
    tl.store(slot_C, tl.sum(flow_RC, axis=0), mask=real_C)
    tl.store(slot_C + channels, tl.sum(twist_RC, axis=0), mask=real_C)
    if ADD:
        tl.store(slot_C + 2 * channels, tl.sum(drift_RC, axis=0), mask=real_C)


@triton.jit
def _total(partial, image, which, channels, chunks, channel_C, real_C, BLOCK_K: tl.constexpr):
    chunk_K = tl.arange(0, BLOCK_K)
    slot_KC = partial + ((image * chunks + chunk_K)[:, None] * 3 + which) * channels + channel_C[None, :]
    return tl.sum(tl.load(slot_KC, mask=(chunk_K < chunks)[:, None] & real_C[None, :], other=0.0), axis=0)


@triton.jit
def _backward_apply(
    x, dy, weight, bias, add, scale, shift, mean, rstd, partial, dx, per_image, dadd, dscale, dshift,
    channels, groups, pixels, width, rows, chunks,
    x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, dx_n, dx_w, dx_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, FLAT_DY: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Gradient of one chunk of rows from the sums of all chunks."""
    image, chunk = _last_first()
    lane_C = tl.arange(0, BLOCK_C)
    channel_C = tl.program_id(0) * SPAN + lane_C
    real_C = (lane_C < SPAN) & (channel_C < channels)
    group_C = channel_C // PER_GROUP
    rstd_C = tl.load(rstd + image * groups + group_C, mask=real_C, other=0.0)
    centre_C = tl.load(mean + image * groups + group_C, mask=real_C, other=0.0)
    centre_C -= _per_image(add, image, add_n, channel_C, real_C, ADD)
    gain_C, offset_C = _affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)

    flow_C = _total(partial, image, 0, channels, chunks, channel_C, real_C, BLOCK_K)
    twist_C = _total(partial, image, 1, channels, chunks, channel_C, real_C, BLOCK_K)
    count = pixels * PER_GROUP
    common_G = _fold(gain_C * flow_C, PER_GROUP, BLOCK_C, BLOCK_G) / count
    tilt_G = _fold(gain_C * twist_C, PER_GROUP, BLOCK_C, BLOCK_G) / count
    common_C = _spread(common_G, PER_GROUP, BLOCK_C, BLOCK_G)
    tilt_C = _spread(tilt_G, PER_GROUP, BLOCK_C, BLOCK_G)
    if chunk == 0:
        drift_C = flow_C
        if ADD:
            drift_C = _total(partial, image, 2, channels, chunks, channel_C, real_C, BLOCK_K)
        _small_gradients(
            weight, bias, scale, per_image, dadd, dscale, dshift, image, channels, channel_C, real_C,
            flow_C, twist_C, drift_C, common_C, tilt_C, rstd_C, gain_C, pixels, scale_n, ADD, SCALE, SHIFT,
        )

    last = tl.minimum(chunk * rows + rows, pixels)
    for first in range(chunk * rows, last, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_RC = (row_R < last)[:, None] & real_C[None, :]
        from_RC = x + image * x_n + _offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT)
        x_RC = tl.load(from_RC, mask=real_RC, other=0.0)
        at_RC = dy + image * dy_n + _offsets(row_R, channel_C, width, dy_h, dy_w, dy_c, FLAT_DY)
        dy_RC = tl.load(at_RC, mask=real_RC, other=0.0).to(tl.float32)
        normal_RC = (x_RC.to(tl.float32) - centre_C[None, :]) * rstd_C[None, :]
        dv_RC = _through_silu(dy_RC, normal_RC, gain_C, offset_C, SILU)
        value_RC = rstd_C[None, :] * (gain_C[None, :] * dv_RC - common_C[None, :] - normal_RC * tilt_C[None, :])
        dx_RC = dx + image * dx_n + row_R[:, None] * dx_w + channel_C[None, :] * dx_c
        tl.store(dx_RC, value_RC.to(dx.dtype.element_ty), mask=real_RC)

# fmt: on

# ----------------------------------------------------------------------------------------------------- operators

_LINE_BYTES = 128
_HALF_LINE_BYTES = 64
_WHOLE_ELEMENTS = 16384
_WHOLE_ELEMENTS_MODULATED_BACKWARD = 8192  # twice that spills on sm_90: a row per modulation is live beside x and dy
_TILE = 4096
_MOST_CHUNKS = 64
_LEAST_ROWS = 512


@dataclass(frozen=True)
class Tiling:
    """How one call is cut into programs; `chunks` is 0 where a program holds a whole slab."""

    span: int  # channels of a program, always whole groups
    block_c: int
    block_g: int
    block_r: int  # rows in a tile
    rows: int  # rows of a program
    chunks: int
    warps: int


def tiling(channels: int, groups: int, pixels: int, itemsize: int, room: int = _WHOLE_ELEMENTS) -> Tiling:
    """Cut a call into programs by its shape alone, so that the same call is always summed in the same order."""
    # Half lines are worth it only where they spare a second read of everything.
    for line_bytes in (_LINE_BYTES, _HALF_LINE_BYTES):
        span = _channel_span(channels, groups, line_bytes // itemsize)
        whole_r, block_c = _power_of_2(pixels), _power_of_2(span)
        if whole_r * block_c <= room:
            block_g = _block_g(span, channels // groups)
            return Tiling(span, block_c, block_g, whole_r, pixels, 0, _warps(whole_r * block_c))
    span = _channel_span(channels, groups, _LINE_BYTES // itemsize)
    block_c = _power_of_2(span)
    block_r = max(1, _TILE // block_c)
    rows = max(_LEAST_ROWS, math.ceil(pixels / _MOST_CHUNKS))
    rows = math.ceil(rows / block_r) * block_r
    block_g = _block_g(span, channels // groups)
    return Tiling(span, block_c, block_g, block_r, rows, math.ceil(pixels / rows), _warps(2 * _TILE))


def _channel_span(channels, groups, least):
    """Whole groups of at least that many channels with the fewest idle lanes; equal shares of the channels."""
    per_group = channels // groups
    shares = [k * per_group for k in range(1, groups + 1) if groups % k == 0]
    wide = [span for span in shares if span >= least] or shares[-1:]
    return min(wide, key=lambda span: (_power_of_2(span) / span, span))


def _block_g(span, per_group):
    is_even = per_group & (per_group - 1) == 0
    return _power_of_2(span) // per_group if is_even else _power_of_2(span // per_group)


def _power_of_2(number):
    return 1 << (number - 1).bit_length()


def _warps(elements):
    return min(16, max(4, elements // 1024))


def _is_flat(image_NCHW):
    """Rows of pixels follow one another at one stride, so that a pixel needs no division."""
    return image_NCHW.shape[2] == 1 or image_NCHW.stride(2) == image_NCHW.shape[3] * image_NCHW.stride(3)


def _dense_like(x_NCHW):
    return torch.empty_like(x_NCHW, memory_format=memory_format_of(x_NCHW))


def _strides(name, image_NCHW):
    return {f"{name}_{axis}": stride for axis, stride in zip("nchw", image_NCHW.stride())}


def _dense_strides(name, image_NCHW):
    return {f"{name}_{axis}": image_NCHW.stride(index) for axis, index in (("n", 0), ("c", 1), ("w", 3))}


def _modulation(weight_C, add_NC, scale_NC, shift_NC):
    """Arguments for the optional per-image values: a stand-in pointer, stride and switch for the absent ones."""
    arguments = {}
    for name, value in _named(add_NC, scale_NC, shift_NC).items():
        value = _unit_stride(value)
        arguments[name] = weight_C if value is None else value
        arguments[f"{name}_n"] = 0 if value is None else value.stride(0)
        arguments[name.upper()] = value is not None
    return arguments


def _unit_stride(values):
    """Per-channel values side by side: a few kilobytes at most, not worth a stride in every kernel."""
    return values if values is None or values.stride(-1) == 1 else values.contiguous()


def _sizes(x_NCHW, groups):
    _, channels, height, width = x_NCHW.shape
    return {"channels": channels, "groups": groups, "pixels": height * width, "width": width}


def _blocks(cut, per_group):
    blocks = {"SPAN": cut.span, "PER_GROUP": per_group, "BLOCK_R": cut.block_r, "BLOCK_C": cut.block_c}
    return blocks | {"num_warps": cut.warps}


@triton_op("duotone::group_norm_silu", mutates_args={})
def _forward(
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    add_NC: Tensor | None,
    scale_NC: Tensor | None,
    shift_NC: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    images, channels, height, width = x_NCHW.shape
    cut = tiling(channels, groups, height * width, x_NCHW.element_size())
    y_NCHW = _dense_like(x_NCHW)
    mean_NG = torch.empty(images, groups, dtype=torch.float32, device=x_NCHW.device)
    rstd_NG = torch.empty_like(mean_NG)
    modulation = _modulation(weight_C, add_NC, scale_NC, shift_NC)
    shared = _sizes(x_NCHW, groups) | _strides("x", x_NCHW) | _blocks(cut, channels // groups)
    shared |= {"x": x_NCHW, "FLAT": _is_flat(x_NCHW), "BLOCK_G": cut.block_g}
    output = {"weight": _unit_stride(weight_C), "bias": _unit_stride(bias_C), "y": y_NCHW}
    output |= {"mean": mean_NG, "rstd": rstd_NG}
    output |= modulation | _dense_strides("y", y_NCHW) | {"eps": eps, "SILU": silu}
    spans = math.ceil(channels / cut.span)
    if not cut.chunks:
        launch(NAME, wrap_triton(_forward_whole), (spans, images), shared | output)
        return y_NCHW, mean_NG, rstd_NG
    shared |= {"rows": cut.rows, "chunks": cut.chunks}
    shared["partial"] = torch.empty(images, cut.chunks, 2, groups, dtype=torch.float32, device=x_NCHW.device)
    grid = (spans, cut.chunks, images)
    add = {name: modulation[name] for name in ("add", "add_n", "ADD")}
    launch(NAME, wrap_triton(_forward_statistics), grid, shared | add)
    launch(NAME, wrap_triton(_forward_apply), grid, shared | output | {"BLOCK_K": _power_of_2(cut.chunks)})
    return y_NCHW, mean_NG, rstd_NG


@triton_op("duotone::group_norm_silu_backward", mutates_args={})
def _backward(
    dy_NCHW: Tensor,
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    add_NC: Tensor | None,
    scale_NC: Tensor | None,
    shift_NC: Tensor | None,
    mean_NG: Tensor,
    rstd_NG: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, channels, height, width = x_NCHW.shape
    is_plain = add_NC is None and scale_NC is None and shift_NC is None
    room = _WHOLE_ELEMENTS if is_plain else _WHOLE_ELEMENTS_MODULATED_BACKWARD
    cut = tiling(channels, groups, height * width, x_NCHW.element_size(), room)
    dx_NCHW = _dense_like(x_NCHW)
    per_image_N2C = torch.empty(images, 2, channels, dtype=torch.float32, device=x_NCHW.device)
    small = {f"d{name}": _gradient_like(value, x_NCHW) for name, value in _named(add_NC, scale_NC, shift_NC).items()}
    modulation = _modulation(weight_C, add_NC, scale_NC, shift_NC)
    shared = _sizes(x_NCHW, groups) | _strides("x", x_NCHW) | _strides("dy", dy_NCHW) | _blocks(cut, channels // groups)
    shared |= {"x": x_NCHW, "dy": dy_NCHW, "weight": _unit_stride(weight_C), "bias": _unit_stride(bias_C)}
    shared |= {"mean": mean_NG, "rstd": rstd_NG}
    shared |= modulation | {"SILU": silu, "FLAT": _is_flat(x_NCHW), "FLAT_DY": _is_flat(dy_NCHW)}
    output = {"dx": dx_NCHW, "per_image": per_image_N2C, "BLOCK_G": cut.block_g} | _dense_strides("dx", dx_NCHW) | small
    spans = math.ceil(channels / cut.span)
    if not cut.chunks:
        launch(NAME, wrap_triton(_backward_whole), (spans, images), shared | output)
    else:
        shared |= {"rows": cut.rows, "chunks": cut.chunks}
        shared["partial"] = torch.empty(images, cut.chunks, 3, channels, dtype=torch.float32, device=x_NCHW.device)
        grid = (spans, cut.chunks, images)
        launch(NAME, wrap_triton(_backward_sums), grid, shared)
        launch(NAME, wrap_triton(_backward_apply), grid, shared | output | {"BLOCK_K": _power_of_2(cut.chunks)})
    return dx_NCHW, per_image_N2C.sum(dim=0), small["dadd"], small["dscale"], small["dshift"]


def _named(add_NC, scale_NC, shift_NC):
    return {"add": add_NC, "scale": scale_NC, "shift": shift_NC}


def _gradient_like(value_NC, x_NCHW):
    if value_NC is None:
        return torch.empty(0, dtype=torch.float32, device=x_NCHW.device)
    return torch.empty(value_NC.shape, dtype=value_NC.dtype, device=x_NCHW.device)


def _save(ctx, inputs, output):
    x_NCHW, weight_C, bias_C, add_NC, scale_NC, shift_NC, ctx.groups, _, ctx.silu = inputs
    _, mean_NG, rstd_NG = output
    ctx.save_for_backward(x_NCHW, weight_C, bias_C, add_NC, scale_NC, shift_NC, mean_NG, rstd_NG)


def _differentiate(ctx, dy_NCHW, _dmean, _drstd):
    saved = ctx.saved_tensors
    dx_NCHW, dweight_bias_2C, *small = _backward(dy_NCHW, *saved, ctx.groups, ctx.silu)
    dweight_C, dbias_C = (gradient.to(saved[1].dtype) for gradient in dweight_bias_2C)
    dadd, dscale, dshift = (None if value is None else gradient for gradient, value in zip(small, saved[3:6]))
    return dx_NCHW, dweight_C, dbias_C, dadd, dscale, dshift, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)

# -------------------------------------------------------------------------------------------------------- public


def group_norm_silu(
    x_NCHW, weight_C, bias_C, groups, eps=1e-5, *, shift_NC=None, scale_NC=None, add_NC=None, silu=True
):
    """Normalise, modulate and activate in one operation; channels-last in, channels-last out.

    Weights and modulation may be of another floating type than the image. Raises ValueError on shapes, groups or
    devices that do not fit.
    """
    _validate(x_NCHW, weight_C, bias_C, groups, {"shift_NC": shift_NC, "scale_NC": scale_NC, "add_NC": add_NC})
    reason = _unsupported(x_NCHW, groups) if runs_kernel(NAME, x_NCHW) else ""
    if reason:
        count_fallback(NAME, reason, *x_NCHW.shape)
    elif reason is None:
        return _forward(x_NCHW, weight_C, bias_C, add_NC, scale_NC, shift_NC, groups, eps, silu)[0]
    return group_norm_silu_reference(
        x_NCHW, weight_C, bias_C, groups, eps, shift_NC=shift_NC, scale_NC=scale_NC, add_NC=add_NC, silu=silu
    )


def _unsupported(x_NCHW, groups):
    """Why a call cannot run as a kernel, or None."""
    images, channels, height, width = x_NCHW.shape
    if x_NCHW.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{x_NCHW.dtype} images"
    if x_NCHW.numel() == 0:
        return "an empty image"
    if channels // groups > 4096:
        return "more than 4096 channels per group"
    if images > 65535 or channels * height * width >= 2**31:
        return "more images or pixels than a grid addresses"
    return None


def _validate(x_NCHW, weight_C, bias_C, groups, modulation):
    require(x_NCHW.dim() == 4, "x_NCHW", "4-dimensional", tuple(x_NCHW.shape))
    require(x_NCHW.is_floating_point(), "x_NCHW", "a floating-point tensor", x_NCHW.dtype)
    images, channels = x_NCHW.shape[:2]
    require(groups > 0 and channels % groups == 0, "groups", f"a positive divisor of {channels} channels", groups)
    for name, value in {"weight_C": weight_C, "bias_C": bias_C}.items():
        require(tuple(value.shape) == (channels,), name, f"of shape ({channels},)", tuple(value.shape))
        require_same_device(name, value, x_NCHW)
    for name, value in modulation.items():
        if value is not None:
            require(tuple(value.shape) == (images, channels), name, f"({images}, {channels})", tuple(value.shape))
            require_same_device(name, value, x_NCHW)
