"""Device code of group_norm_silu's gradients: on chip, in two launches, or in one launch in turns.

A program owns whole groups: SPAN channels of one image, so that it reads full cache lines of a channels-last image.
JOIN: x was joined from two parts at channel `border`. The joined image's own gradient, `djoined`, in the layout of x,
is added, and each part gets a dense gradient: dx and dskip.
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
def _through_silu(dy_RC, normal_RC, gain_C, offset_C, SILU: tl.constexpr):
    """Gradient at the activation's input; that input is recomputed from the normalised values."""
    if SILU:
        value_RC = normal_RC * gain_C[None, :] + offset_C[None, :]
        gate_RC = tl.sigmoid(value_RC)
        return dy_RC * gate_RC * (1.0 + value_RC * (1.0 - gate_RC))
    else:
        return dy_RC


@triton.jit
def _saved(mean, rstd, add, image, add_n, groups, channel_C, real_C, PER_GROUP: tl.constexpr, ADD: tl.constexpr):
    """Reciprocal standard deviation and centre of every channel, saved by the forward pass."""
    group_C = channel_C // PER_GROUP
    rstd_C = tl.load(rstd + image * groups + group_C, mask=real_C, other=0.0)
    centre_C = tl.load(mean + image * groups + group_C, mask=real_C, other=0.0)
    return rstd_C, centre_C - of_image(add, image, add_n, channel_C, real_C, ADD)


@triton.jit
def _centred(twist_C, flow_C, drift_C, pixels, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Twist and drift as if every group's mean were exactly 0: the saved mean's last bit leaves it slightly off."""
    left_G = fold(drift_C, PER_GROUP, BLOCK_C, BLOCK_G) / (pixels * PER_GROUP)
    left_C = spread(left_G, PER_GROUP, BLOCK_C, BLOCK_G)
    return twist_C - left_C * flow_C, drift_C - left_C * pixels


@triton.jit
def _small_gradients(
    weight, bias, scale, per_image, dadd, dscale, dshift, image, channels, channel_C, real_C,
    flow_C, twist_C, drift_C, common_C, tilt_C, rstd_C, gain_C, pixels, scale_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):
    """Store one image's contribution to every per-channel gradient, from its three sums over pixels.

    flow = sum of dv, twist = sum of dv * normal, drift = sum of normal; common and tilt, the group means of gain * dv
    and gain * dv * normal, are what dx subtracts.
    """
    factor_C = 1.0 + of_image(scale, image, scale_n, channel_C, real_C, SCALE)
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
def _store_gradient(
    dx, dskip, djoined, value_RC, image, row_R, channel_C, real_RC, channels, pixels, border,
    x_n, x_w, x_c, dx_n, dx_w, dx_c,
    JOIN: tl.constexpr,
):
    """Store dx; with JOIN, add the joined image's own gradient and store each part's share as dx and dskip."""
    if JOIN:
        from_RC = djoined + image * x_n + row_R[:, None] * x_w + channel_C[None, :] * x_c
        value_RC += tl.load(from_RC, mask=real_RC, other=0.0).to(tl.float32)
        dx_RC = apart(dx, dskip, image, row_R, channel_C, channels, pixels, border)
    else:
        dx_RC = dx + image * dx_n + row_R[:, None] * dx_w + channel_C[None, :] * dx_c
    tl.store(dx_RC, value_RC.to(dx.dtype.element_ty), mask=real_RC)


@triton.jit
def backward_whole(
    x, dy, djoined, weight, bias, add, scale, shift, mean, rstd, dx, dskip, per_image, dadd, dscale, dshift,
    channels, groups, pixels, width, border,
    x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, dx_n, dx_w, dx_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, FLAT_DY: tl.constexpr, JOIN: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """One program keeps x and dy of its slab on chip and computes the sums, then dx, from one read of each."""
    image = tl.program_id(1).to(tl.int64)
    channel_C, real_C = channels_of(tl.program_id(0), channels, SPAN, BLOCK_C)
    row_R = tl.arange(0, BLOCK_R)
    real_RC = (row_R < pixels)[:, None] & real_C[None, :]
    x_RC = tl.load(x + image * x_n + offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT), mask=real_RC, other=0.0)
    at_RC = dy + image * dy_n + offsets(row_R, channel_C, width, dy_h, dy_w, dy_c, FLAT_DY)
    dy_RC = tl.load(at_RC, mask=real_RC, other=0.0)

    rstd_C, centre_C = _saved(mean, rstd, add, image, add_n, groups, channel_C, real_C, PER_GROUP, ADD)
    gain_C, offset_C = affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
    normal_RC = tl.where(real_RC, (x_RC.to(tl.float32) - centre_C[None, :]) * rstd_C[None, :], 0.0)
    dv_RC = _through_silu(dy_RC.to(tl.float32), normal_RC, gain_C, offset_C, SILU)
    flow_C = tl.sum(dv_RC, axis=0)
    twist_C = tl.sum(dv_RC * normal_RC, axis=0)
    drift_C = flow_C
    if ADD:
        drift_C = tl.sum(normal_RC, axis=0)
        twist_C, drift_C = _centred(twist_C, flow_C, drift_C, pixels, PER_GROUP, BLOCK_C, BLOCK_G)

    count = pixels * PER_GROUP
    common_G = fold(gain_C * flow_C, PER_GROUP, BLOCK_C, BLOCK_G) / count
    tilt_G = fold(gain_C * twist_C, PER_GROUP, BLOCK_C, BLOCK_G) / count
    common_C = spread(common_G, PER_GROUP, BLOCK_C, BLOCK_G)
    tilt_C = spread(tilt_G, PER_GROUP, BLOCK_C, BLOCK_G)
    value_RC = rstd_C[None, :] * (gain_C[None, :] * dv_RC - common_C[None, :] - normal_RC * tilt_C[None, :])
    _store_gradient(
        dx, dskip, djoined, value_RC, image, row_R, channel_C, real_RC, channels, pixels, border,
        x_n, x_w, x_c, dx_n, dx_w, dx_c, JOIN,
    )
    _small_gradients(
        weight, bias, scale, per_image, dadd, dscale, dshift, image, channels, channel_C, real_C,
        flow_C, twist_C, drift_C, common_C, tilt_C, rstd_C, gain_C, pixels, scale_n, ADD, SCALE, SHIFT,
    )


@triton.jit
def _tile(
    x, dy, row_R, real_RC, channel_C, rstd_C, centre_C, gain_C, offset_C,
    width, x_h, x_w, x_c, dy_h, dy_w, dy_c,
    SILU: tl.constexpr, FLAT: tl.constexpr, FLAT_DY: tl.constexpr,
):
    """Normalised values and gradient at the activation's input for a tile of rows; 0 in lanes outside the image."""
    x_RC = tl.load(x + offsets(row_R, channel_C, width, x_h, x_w, x_c, FLAT), mask=real_RC, other=0.0)
    dy_RC = tl.load(dy + offsets(row_R, channel_C, width, dy_h, dy_w, dy_c, FLAT_DY), mask=real_RC, other=0.0)
    normal_RC = tl.where(real_RC, (x_RC.to(tl.float32) - centre_C[None, :]) * rstd_C[None, :], 0.0)
    return normal_RC, _through_silu(dy_RC.to(tl.float32), normal_RC, gain_C, offset_C, SILU)


@triton.jit
def _chunk_sums(
    x, dy, weight, bias, add, scale, shift, mean, rstd, partial, image, chunk, channel_C, real_C,
    channels, groups, pixels, width, rows, chunks,
    x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, FLAT_DY: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Store per-channel sums over one chunk of rows: dv, dv * normal, and normal where `add` needs it."""
    rstd_C, centre_C = _saved(mean, rstd, add, image, add_n, groups, channel_C, real_C, PER_GROUP, ADD)
    gain_C, offset_C = affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
    flow_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    twist_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    drift_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    last = tl.minimum(chunk * rows + rows, pixels)
    for first in range(chunk * rows, last, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_RC = (row_R < last)[:, None] & real_C[None, :]
        normal_RC, dv_RC = _tile(
            x + image * x_n, dy + image * dy_n, row_R, real_RC, channel_C, rstd_C, centre_C, gain_C, offset_C,
            width, x_h, x_w, x_c, dy_h, dy_w, dy_c, SILU, FLAT, FLAT_DY,
        )
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
def _totals(
    partial, image, channels, chunks, channel_C, real_C, gain_C, count,
    ADD: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The sums over all chunks: flow, twist and drift per channel, common and tilt per group."""
    flow_C = _total(partial, image, 0, channels, chunks, channel_C, real_C, BLOCK_K)
    twist_C = _total(partial, image, 1, channels, chunks, channel_C, real_C, BLOCK_K)
    drift_C = flow_C
    if ADD:
        drift_C = _total(partial, image, 2, channels, chunks, channel_C, real_C, BLOCK_K)
        pixels = count // PER_GROUP
        twist_C, drift_C = _centred(twist_C, flow_C, drift_C, pixels, PER_GROUP, BLOCK_C, BLOCK_G)
    common_G = fold(gain_C * flow_C, PER_GROUP, BLOCK_C, BLOCK_G) / count
    tilt_G = fold(gain_C * twist_C, PER_GROUP, BLOCK_C, BLOCK_G) / count
    return flow_C, twist_C, drift_C, common_G, tilt_G


@triton.jit
def _chunk_gradient(
    x, dy, djoined, dx, dskip, image, chunk, channel_C, real_C,
    rstd_C, centre_C, gain_C, offset_C, common_C, tilt_C,
    channels, pixels, width, rows, border,
    x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, dx_n, dx_w, dx_c,
    SILU: tl.constexpr, FLAT: tl.constexpr, FLAT_DY: tl.constexpr, JOIN: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """Store the gradient of one chunk of rows."""
    last = tl.minimum(chunk * rows + rows, pixels)
    for first in range(chunk * rows, last, BLOCK_R):
        row_R = first + tl.arange(0, BLOCK_R)
        real_RC = (row_R < last)[:, None] & real_C[None, :]
        normal_RC, dv_RC = _tile(
            x + image * x_n, dy + image * dy_n, row_R, real_RC, channel_C, rstd_C, centre_C, gain_C, offset_C,
            width, x_h, x_w, x_c, dy_h, dy_w, dy_c, SILU, FLAT, FLAT_DY,
        )
        value_RC = rstd_C[None, :] * (gain_C[None, :] * dv_RC - common_C[None, :] - normal_RC * tilt_C[None, :])
        _store_gradient(
            dx, dskip, djoined, value_RC, image, row_R, channel_C, real_RC, channels, pixels, border,
            x_n, x_w, x_c, dx_n, dx_w, dx_c, JOIN,
        )


@triton.jit
def backward_sums(
    x, dy, weight, bias, add, scale, shift, mean, rstd, partial,
    channels, groups, pixels, width, rows, chunks,
    x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, FLAT_DY: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The first of two launches: the sums over every chunk of rows."""
    channel_C, real_C = channels_of(tl.program_id(0), channels, SPAN, BLOCK_C)
    _chunk_sums(
        x, dy, weight, bias, add, scale, shift, mean, rstd, partial,
        tl.program_id(2).to(tl.int64), tl.program_id(1), channel_C, real_C,
        channels, groups, pixels, width, rows, chunks,
        x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, add_n, scale_n, shift_n,
        ADD, SCALE, SHIFT, SILU, FLAT, FLAT_DY, PER_GROUP, BLOCK_R, BLOCK_C,
    )


@triton.jit
def backward_apply(
    x, dy, djoined, weight, bias, add, scale, shift, mean, rstd, partial, dx, dskip, per_image, dadd, dscale, dshift,
    channels, groups, pixels, width, rows, chunks, border,
    x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, dx_n, dx_w, dx_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, FLAT_DY: tl.constexpr, JOIN: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The second of two launches: the gradient of one chunk of rows from the sums of all chunks."""
    image, chunk = last_first()
    channel_C, real_C = channels_of(tl.program_id(0), channels, SPAN, BLOCK_C)
    rstd_C, centre_C = _saved(mean, rstd, add, image, add_n, groups, channel_C, real_C, PER_GROUP, ADD)
    gain_C, offset_C = affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
    flow_C, twist_C, drift_C, common_G, tilt_G = _totals(
        partial, image, channels, chunks, channel_C, real_C, gain_C, pixels * PER_GROUP,
        ADD, PER_GROUP, BLOCK_C, BLOCK_G, BLOCK_K,
    )
    common_C = spread(common_G, PER_GROUP, BLOCK_C, BLOCK_G)
    tilt_C = spread(tilt_G, PER_GROUP, BLOCK_C, BLOCK_G)
    if chunk == 0:
        _small_gradients(
            weight, bias, scale, per_image, dadd, dscale, dshift, image, channels, channel_C, real_C,
            flow_C, twist_C, drift_C, common_C, tilt_C, rstd_C, gain_C, pixels, scale_n, ADD, SCALE, SHIFT,
        )
    _chunk_gradient(
        x, dy, djoined, dx, dskip, image, chunk, channel_C, real_C,
        rstd_C, centre_C, gain_C, offset_C, common_C, tilt_C,
        channels, pixels, width, rows, border,
        x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, dx_n, dx_w, dx_c,
        SILU, FLAT, FLAT_DY, JOIN, BLOCK_R,
    )


@triton.jit
def backward_in_turn(
    x, dy, djoined, weight, bias, add, scale, shift, mean, rstd, partial, turns, of_group,
    dx, dskip, per_image, dadd, dscale, dshift,
    channels, groups, pixels, width, rows, chunks, border, spans, slabs, ahead,
    x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, dx_n, dx_w, dx_c, add_n, scale_n, shift_n,
    ADD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
    FLAT: tl.constexpr, FLAT_DY: tl.constexpr, JOIN: tl.constexpr,
    SPAN: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Both passes in one launch; the program that ends a slab's last first pass sums its chunks.

    It leaves common and tilt in `of_group` for the second passes.
    """
    is_second, slab, chunk = take_turn(turns, slabs, chunks, ahead)
    image = (slab // spans).to(tl.int64)
    channel_C, real_C = channels_of(slab % spans, channels, SPAN, BLOCK_C)
    group_G, real_G = groups_of(slab % spans, groups, SPAN, PER_GROUP, BLOCK_G)
    to_G = of_group + image * 2 * groups + group_G
    if is_second:
        wait_for_first_passes(turns, slab, chunks)
        rstd_C, centre_C = _saved(mean, rstd, add, image, add_n, groups, channel_C, real_C, PER_GROUP, ADD)
        gain_C, offset_C = affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
        common_C = spread(tl.load(to_G, mask=real_G, other=0.0), PER_GROUP, BLOCK_C, BLOCK_G)
        tilt_C = spread(tl.load(to_G + groups, mask=real_G, other=0.0), PER_GROUP, BLOCK_C, BLOCK_G)
        _chunk_gradient(
            x, dy, djoined, dx, dskip, image, chunk, channel_C, real_C,
            rstd_C, centre_C, gain_C, offset_C, common_C, tilt_C,
            channels, pixels, width, rows, border,
            x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, dx_n, dx_w, dx_c,
            SILU, FLAT, FLAT_DY, JOIN, BLOCK_R,
        )
    else:
        _chunk_sums(
            x, dy, weight, bias, add, scale, shift, mean, rstd, partial, image, chunk, channel_C, real_C,
            channels, groups, pixels, width, rows, chunks,
            x_n, x_h, x_w, x_c, dy_n, dy_h, dy_w, dy_c, add_n, scale_n, shift_n,
            ADD, SCALE, SHIFT, SILU, FLAT, FLAT_DY, PER_GROUP, BLOCK_R, BLOCK_C,
        )
        if end_first_pass(turns, slab) == chunks - 1:
            rstd_C, centre_C = _saved(mean, rstd, add, image, add_n, groups, channel_C, real_C, PER_GROUP, ADD)
            gain_C, offset_C = affine(weight, bias, scale, shift, image, scale_n, shift_n, channel_C, real_C, SCALE, SHIFT)
            flow_C, twist_C, drift_C, common_G, tilt_G = _totals(
                partial, image, channels, chunks, channel_C, real_C, gain_C, pixels * PER_GROUP,
                ADD, PER_GROUP, BLOCK_C, BLOCK_G, BLOCK_K,
            )
            tl.store(to_G, common_G, mask=real_G)
            tl.store(to_G + groups, tilt_G, mask=real_G)
            publish(turns, slab)
            common_C = spread(common_G, PER_GROUP, BLOCK_C, BLOCK_G)
            tilt_C = spread(tilt_G, PER_GROUP, BLOCK_C, BLOCK_G)
            _small_gradients(
                weight, bias, scale, per_image, dadd, dscale, dshift, image, channels, channel_C, real_C,
                flow_C, twist_C, drift_C, common_C, tilt_C, rstd_C, gain_C, pixels, scale_n, ADD, SCALE, SHIFT,
            )
