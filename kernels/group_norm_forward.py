"""Device code of group_norm_silu's forward pass: on chip, in two launches, or in one launch in turns.

A program owns whole groups: SPAN channels of one image, so that it reads full cache lines of a channels-last image.
JOIN: the image comes in two parts, x below channel `border` and a skip from there on; the first pass that reads them
writes them as one image, `joined`, in the layout of y.
Signatures are grouped by subject: tensors, sizes, strides, switches, tile.
R rows (pixels) of a tile, C channels of a program, G groups of a program, K chunks of rows.
"""

from duotone.kernels.dispatch import tl, triton
from duotone.kernels.group_norm_lanes import (
    affine,
    apart,
    channels_of,
    fold,
    groups_of,
    last_first,
    of_image,
    offsets,
    spread,
)
from duotone.kernels.turns import end_first_pass, publish, take_turn, wait_for_first_passes

# fmt: off


@triton.jit
def forward_whole(
    x, skip, weight, bias, add, scale, shift, y, joined, mean, rstd,
    channels, groups, pixels, width, border, eps,
    x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, JOIN: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """One program keeps its slab on chip and computes mean, centred squares and output from one read."""
    eps = tl.cast(eps, tl.float32)  # torch.compile passes Python numbers as fp64, which would promote the rest
    image = tl.program_id(1).to(tl.int64)
    channel_C, real_C = channels_of(tl.program_id(0), channels, SPAN, BLOCK_C)
    row_R = tl.arange(0, BLOCK_R)
    real_RC = (row_R < pixels)[:, None] & real_C[None, :]
    to_RC = image * y_n + row_R[:, None] * y_w + channel_C[None, :] * y_c
    if JOIN:
        x_RC = tl.load(apart(x, skip, image, row_R, channel_C, channels, pixels, border), mask=real_RC, other=0.0)
        tl.store(joined + to_RC, x_RC, mask=real_RC)
    else:
        x_RC = tl.load(x + image * x_n + offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT), mask=real_RC, other=0.0)
    add_C = of_image(add, image, add_n, channel_C, real_C, ADD)

    count = pixels * PER_GROUP
    z_RC = tl.where(real_RC, x_RC.to(tl.float32) + add_C[None, :], 0.0)
    mean_G = fold(tl.sum(z_RC, axis=0), PER_GROUP, BLOCK_C, BLOCK_G) / count
    mean_C = spread(mean_G, PER_GROUP, BLOCK_C, BLOCK_G)
    centred_RC = tl.where(real_RC, z_RC - mean_C[None, :], 0.0)
    square_G = fold(tl.sum(centred_RC * centred_RC, axis=0), PER_GROUP, BLOCK_C, BLOCK_G) / count
    # The mean's rounding error: without this correction, an image far from zero would keep an offset.
    left_G = fold(tl.sum(centred_RC, axis=0), PER_GROUP, BLOCK_C, BLOCK_G) / count
    rstd_G = 1.0 / tl.sqrt(square_G - left_G * left_G + eps)

    gain_C, offset_C = affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
    gain_C *= spread(rstd_G, PER_GROUP, BLOCK_C, BLOCK_G)
    offset_C -= spread(left_G, PER_GROUP, BLOCK_C, BLOCK_G) * gain_C
    value_RC = centred_RC * gain_C[None, :] + offset_C[None, :]
    if SILU:
        value_RC = value_RC * tl.sigmoid(value_RC)
    tl.store(y + to_RC, value_RC.to(y.dtype.element_ty), mask=real_RC)

    group_G, real_G = groups_of(tl.program_id(0), groups, SPAN, PER_GROUP, BLOCK_G)
    tl.store(mean + image * groups + group_G, mean_G + left_G, mask=real_G)
    tl.store(rstd + image * groups + group_G, rstd_G, mask=real_G)


@triton.jit
def _chunk_statistics(
    x, skip, add, joined, partial, image, chunk, channel_C, real_C, group_G, real_G,
    channels, groups, pixels, width, rows, chunks, border,
    x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n,
    ADD: tl.constexpr, FLAT: tl.constexpr, JOIN: tl.constexpr,
    PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """Store mean and centred squares of one chunk of rows: Welford's update in every lane, merged once at the end."""
    last = tl.minimum(chunk * rows + rows, pixels)
    mean_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    square_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    count_R = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(chunk * rows, last, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_R = row_R < last
        real_RC = real_R[:, None] & real_C[None, :]
        if JOIN:
            x_RC = tl.load(apart(x, skip, image, row_R, channel_C, channels, pixels, border), mask=real_RC, other=0.0)
            to_RC = joined + image * y_n + row_R[:, None] * y_w + channel_C[None, :] * y_c
            tl.store(to_RC, x_RC, mask=real_RC)
        else:
            from_RC = x + image * x_n + offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT)
            x_RC = tl.load(from_RC, mask=real_RC, other=0.0)
        count_R += real_R.to(tl.float32)
        delta_RC = tl.where(real_RC, x_RC.to(tl.float32) - mean_RC, 0.0)
        mean_RC += delta_RC * (1.0 / tl.maximum(count_R, 1.0))[:, None]
        square_RC += delta_RC * tl.where(real_RC, x_RC.to(tl.float32) - mean_RC, 0.0)

    # Merge as in Chan, Golub and LeVeque 1979: lanes into channels (then add `add`, which shifts only means), channels
    # into groups. Each mean is corrected by the mean of its residuals, so that it is right to the last bit.
    number = (last - chunk * rows).to(tl.float32)
    mean_C = tl.sum(mean_RC * count_R[:, None], axis=0) / number
    mean_C += tl.sum((mean_RC - mean_C[None, :]) * count_R[:, None], axis=0) / number
    apart_RC = mean_RC - mean_C[None, :]
    square_C = tl.sum(square_RC + apart_RC * apart_RC * count_R[:, None], axis=0)
    mean_C += of_image(add, image, add_n, channel_C, real_C, ADD)
    mean_G = fold(tl.where(real_C, mean_C, 0.0), PER_GROUP, BLOCK_C, BLOCK_G) / PER_GROUP
    left_C = tl.where(real_C, mean_C - spread(mean_G, PER_GROUP, BLOCK_C, BLOCK_G), 0.0)
    mean_G += fold(left_C, PER_GROUP, BLOCK_C, BLOCK_G) / PER_GROUP
    apart_C = mean_C - spread(mean_G, PER_GROUP, BLOCK_C, BLOCK_G)
    square_G = fold(tl.where(real_C, square_C + apart_C * apart_C * number, 0.0), PER_GROUP, BLOCK_C, BLOCK_G)
    slot_G = partial + (image * chunks + chunk) * 2 * groups + group_G
    tl.store(slot_G, mean_G, mask=real_G)
    tl.store(slot_G + groups, square_G, mask=real_G)


@triton.jit
def forward_statistics(
    x, skip, add, joined, partial,
    channels, groups, pixels, width, rows, chunks, border,
    x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n,
    ADD: tl.constexpr, FLAT: tl.constexpr, JOIN: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """The first of two launches: the statistics of every chunk of rows."""
    channel_C, real_C = channels_of(tl.program_id(0), channels, SPAN, BLOCK_C)
    group_G, real_G = groups_of(tl.program_id(0), groups, SPAN, PER_GROUP, BLOCK_G)
    _chunk_statistics(
        x, skip, add, joined, partial, tl.program_id(2).to(tl.int64), tl.program_id(1),
        channel_C, real_C, group_G, real_G,
        channels, groups, pixels, width, rows, chunks, border, x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n,
        ADD, FLAT, JOIN, PER_GROUP, BLOCK_R, BLOCK_C, BLOCK_G,
    )


@triton.jit
def _merged(
    partial, image, group_G, real_G, groups, pixels, rows, chunks, eps, PER_GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Mean and reciprocal standard deviation of each group, merged from its chunks."""
    eps = tl.cast(eps, tl.float32)  # torch.compile passes Python numbers as fp64
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
def _normalise_chunk(
    x, weight, bias, add, scale, shift, y, mean_G, rstd_G, image, chunk, channel_C, real_C,
    pixels, width, rows,
    x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, FLAT: tl.constexpr,
    PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """Store the output of one chunk of rows."""
    gain_C, offset_C = affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
    gain_C *= spread(rstd_G, PER_GROUP, BLOCK_C, BLOCK_G)
    centre_C = spread(mean_G, PER_GROUP, BLOCK_C, BLOCK_G)
    centre_C -= of_image(add, image, add_n, channel_C, real_C, ADD)
    last = tl.minimum(chunk * rows + rows, pixels)
    for first in range(chunk * rows, last, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_RC = (row_R < last)[:, None] & real_C[None, :]
        from_RC = x + image * x_n + offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT)
        x_RC = tl.load(from_RC, mask=real_RC, other=0.0)
        value_RC = (x_RC.to(tl.float32) - centre_C[None, :]) * gain_C[None, :] + offset_C[None, :]
        if SILU:
            value_RC = value_RC * tl.sigmoid(value_RC)
        y_RC = y + image * y_n + row_R[:, None] * y_w + channel_C[None, :] * y_c
        tl.store(y_RC, value_RC.to(y.dtype.element_ty), mask=real_RC)


@triton.jit
def forward_apply(
    x, weight, bias, add, scale, shift, partial, y, mean, rstd,
    channels, groups, pixels, width, rows, chunks, eps,
    x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, FLAT: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The second of two launches: normalise one chunk of rows with the statistics of all chunks."""
    image, chunk = last_first()
    channel_C, real_C = channels_of(tl.program_id(0), channels, SPAN, BLOCK_C)
    group_G, real_G = groups_of(tl.program_id(0), groups, SPAN, PER_GROUP, BLOCK_G)
    mean_G, rstd_G = _merged(partial, image, group_G, real_G, groups, pixels, rows, chunks, eps, PER_GROUP, BLOCK_K)
    if chunk == 0:
        tl.store(mean + image * groups + group_G, mean_G, mask=real_G)
        tl.store(rstd + image * groups + group_G, rstd_G, mask=real_G)
    _normalise_chunk(
        x, weight, bias, add, scale, shift, y, mean_G, rstd_G, image, chunk, channel_C, real_C,
        pixels, width, rows, x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n, scale_n, shift_n,
        ADD, SCALE, SHIFT, SILU, FLAT, PER_GROUP, BLOCK_R, BLOCK_C, BLOCK_G,
    )


@triton.jit
def forward_in_turn(
    x, skip, weight, bias, add, scale, shift, partial, turns, y, joined, mean, rstd,
    channels, groups, pixels, width, rows, chunks, border, spans, slabs, ahead, eps,
    x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, JOIN: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Both passes in one launch: the program that ends a slab's last first pass merges the slab's statistics."""
    is_second, slab, chunk = take_turn(turns, slabs, chunks, ahead)
    image = (slab // spans).to(tl.int64)
    channel_C, real_C = channels_of(slab % spans, channels, SPAN, BLOCK_C)
    group_G, real_G = groups_of(slab % spans, groups, SPAN, PER_GROUP, BLOCK_G)
    to_G = image * groups + group_G
    again, again_n, again_w, again_c = x, x_n, x_w, x_c
    if JOIN:  # the first passes wrote the joined image along with the statistics
        again, again_n, again_w, again_c = joined, y_n, y_w, y_c
    if is_second:
        wait_for_first_passes(turns, slab, chunks)
        mean_G = tl.load(mean + to_G, mask=real_G, other=0.0)
        rstd_G = tl.load(rstd + to_G, mask=real_G, other=0.0)
        _normalise_chunk(
            again, weight, bias, add, scale, shift, y, mean_G, rstd_G, image, chunk, channel_C, real_C,
            pixels, width, rows, again_n, x_h, again_w, again_c, y_n, y_w, y_c, add_n, scale_n, shift_n,
            ADD, SCALE, SHIFT, SILU, FLAT, PER_GROUP, BLOCK_R, BLOCK_C, BLOCK_G,
        )
    else:
        _chunk_statistics(
            x, skip, add, joined, partial, image, chunk, channel_C, real_C, group_G, real_G,
            channels, groups, pixels, width, rows, chunks, border, x_n, x_h, x_w, x_c, y_n, y_w, y_c, add_n,
            ADD, FLAT, JOIN, PER_GROUP, BLOCK_R, BLOCK_C, BLOCK_G,
        )
        if end_first_pass(turns, slab) == chunks - 1:
            mean_G, rstd_G = _merged(
                partial, image, group_G, real_G, groups, pixels, rows, chunks, eps, PER_GROUP, BLOCK_K,
            )
            tl.store(mean + to_G, mean_G, mask=real_G)
            tl.store(rstd + to_G, rstd_G, mask=real_G)
            publish(turns, slab)
