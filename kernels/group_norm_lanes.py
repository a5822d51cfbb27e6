"""What a program of group_norm_silu holds in its lanes: channels, groups, pixels, and the values of one image.

A program owns whole groups: SPAN channels of one image, so that it reads full cache lines of a channels-last image.
Signatures are grouped by subject: tensors, sizes, strides, switches, tile.
R rows (pixels) of a tile, C channels of a program, G groups of a program, K chunks of rows.
"""

from duotone.kernels.dispatch import tl, triton

# fmt: off


@triton.jit
def channels_of(span, channels, SPAN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Indices of a program's channels, and a mask of the lanes that hold one."""
    lane_C = tl.arange(0, BLOCK_C)
    channel_C = span * SPAN + lane_C
    return channel_C, (lane_C < SPAN) & (channel_C < channels)


@triton.jit
def groups_of(span, groups, SPAN: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    lane_G = tl.arange(0, BLOCK_G)
    group_G = span * (SPAN // PER_GROUP) + lane_G
    return group_G, (lane_G < SPAN // PER_GROUP) & (group_G < groups)


@triton.jit
def fold(value_C, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Sum over the channels of each group."""
    if PER_GROUP * BLOCK_G == BLOCK_C:
        return tl.sum(tl.reshape(value_C, (BLOCK_G, PER_GROUP)), axis=1)
    else:
        member_CG = tl.arange(0, BLOCK_C)[:, None] // PER_GROUP == tl.arange(0, BLOCK_G)[None, :]
        return tl.sum(tl.where(member_CG, value_C[:, None], 0.0), axis=0)


@triton.jit
def spread(value_G, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Give every channel its group's value."""
    if PER_GROUP * BLOCK_G == BLOCK_C:
        return tl.reshape(tl.broadcast_to(value_G[:, None], (BLOCK_G, PER_GROUP)), (BLOCK_C,))
    else:
        member_CG = tl.arange(0, BLOCK_C)[:, None] // PER_GROUP == tl.arange(0, BLOCK_G)[None, :]
        return tl.sum(tl.where(member_CG, value_G[None, :], 0.0), axis=1)


@triton.jit
def offsets(row_R, channel_C, width, stride_h, stride_w, stride_c, FLAT: tl.constexpr):
    if FLAT:
        pixel_R = row_R * stride_w
    else:
        pixel_R = (row_R // width) * stride_h + (row_R % width) * stride_w
    return pixel_R[:, None] + channel_C[None, :] * stride_c


@triton.jit
def apart(x, skip, image, row_R, channel_C, channels, pixels, border):
    """Pointers to a tile's values: in x below channel `border`, in the skip from there on; both dense, channels-last.

    The border may cut through a group: each lane chooses its tensor by its own channel.
    """
    first_C = tl.where(
        channel_C < border, x + image * pixels * border + channel_C,
        skip + image * pixels * (channels - border) + channel_C - border,
    )
    stride_C = tl.where(channel_C < border, border, channels - border)
    return first_C[None, :] + row_R[:, None] * stride_C[None, :]


@triton.jit
def of_image(pointer, image, stride, channel_C, real_C, PRESENT: tl.constexpr):
    if PRESENT:
        return tl.load(pointer + image * stride + channel_C, mask=real_C, other=0.0).to(tl.float32)
    else:
        return tl.zeros(channel_C.shape, tl.float32)


@triton.jit
def affine(
    weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):
    """(gain, offset) per channel: normalised values times gain plus offset are the modulated values."""
    factor_C = 1.0 + of_image(scale, image, scale_n, channel_C, real_C, SCALE)
    weight_C = tl.load(weight + channel_C, mask=real_C, other=0.0).to(tl.float32)
    bias_C = tl.load(bias + channel_C, mask=real_C, other=0.0).to(tl.float32)
    offset_C = bias_C * factor_C + of_image(shift, image, shift_n, channel_C, real_C, SHIFT)
    return weight_C * factor_C, offset_C


@triton.jit
def last_first():
    """Image and chunk in reverse order, for the second of two launches: what the first read last is still cached."""
    return (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)
