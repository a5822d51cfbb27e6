"""y = silu(GroupNorm(x + add) * (1 + scale) + shift): x is read once and y written once if a slab fits on chip.

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
    exceeds_32_bit_offsets,
    launch,
    require,
    require_same_device,
    runs_kernel,
    triton_op,
    wrap_triton,
)
from duotone.kernels.group_norm_backward import backward_apply, backward_in_turn, backward_sums, backward_whole
from duotone.kernels.group_norm_forward import forward_apply, forward_in_turn, forward_statistics, forward_whole
from duotone.kernels.group_norm_tiling import (
    WHOLE_ELEMENTS,
    WHOLE_ELEMENTS_MODULATED_BACKWARD,
    Tiling,
    fits_the_cache,
    power_of_2,
    slabs_ahead,
    tiling,
)

NAME = "group_norm_silu"

# ---------------------------------------------------------------------------------------------------- definition


def group_norm_silu_reference(
    x_NCHW, weight_C, bias_C, groups, eps=1e-5, *, shift_NC=None, scale_NC=None, add_NC=None, silu=True
):
    """The definition in plain PyTorch: computed in fp32 (fp64 for fp64 images), returned in the image's type."""
    wide = torch.promote_types(x_NCHW.dtype, torch.float32)
    h_NCHW = x_NCHW.to(wide)
    add_NC = _off_centre(h_NCHW, groups, add_NC)
    if add_NC is not None:
        h_NCHW = h_NCHW + _per_channel(add_NC, wide)
    h_NCHW = _group_norm(h_NCHW, groups, weight_C.to(wide), bias_C.to(wide), eps)
    h_NCHW = _film(h_NCHW, scale_NC, shift_NC, wide)
    y_NCHW = (F.silu(h_NCHW) if silu else h_NCHW).to(x_NCHW.dtype)
    return y_NCHW.contiguous(memory_format=memory_format_of(x_NCHW))


def _group_norm(h_NCHW, groups, weight_C, bias_C, eps):
    """On a CPU, PyTorch 2.13's backward pass crashes if a channels-last image needs no gradient but the weights do."""
    asked = torch.is_grad_enabled() and (weight_C.requires_grad or bias_C.requires_grad)
    if h_NCHW.is_cuda or h_NCHW.requires_grad or not asked:
        return F.group_norm(h_NCHW, groups, weight_C, bias_C, eps)
    return F.group_norm(h_NCHW, groups, eps=eps) * weight_C[:, None, None] + bias_C[:, None, None]


def _off_centre(h_NCHW, groups, add_NC):
    """What to add so that every group is centred: `add_NC` less the group's mean, which the norm removes anyway.

    On a CPU, PyTorch's group norm of channels-last images computes E[x^2] - E[x]^2: ten standard deviations from zero,
    the fourth digit is wrong. Elsewhere its statistics do not cancel. Meta tensors, which lose their memory format in
    convolutions, are treated like a CPU's.
    """
    on_cpu_NHWC = h_NCHW.device.type == "cpu" and memory_format_of(h_NCHW) == torch.channels_last
    if h_NCHW.dtype != torch.float32 or not (on_cpu_NHWC or h_NCHW.is_meta):
        return add_NC
    with torch.no_grad():
        mean_NC = h_NCHW.mean(dim=(2, 3)) if add_NC is None else h_NCHW.mean(dim=(2, 3)) + add_NC
        mean_NG1 = mean_NC.unflatten(1, (groups, -1)).mean(dim=2, keepdim=True)
    if add_NC is None:
        return (-mean_NG1).expand(-1, -1, mean_NC.shape[1] // groups).flatten(1)
    return (add_NC.unflatten(1, (groups, -1)) - mean_NG1).flatten(1)


def _film(h_NCHW, scale_NC, shift_NC, wide):
    if scale_NC is not None and shift_NC is not None:
        return torch.addcmul(_per_channel(shift_NC, wide), h_NCHW, 1 + _per_channel(scale_NC, wide))
    if scale_NC is not None:
        return h_NCHW * (1 + _per_channel(scale_NC, wide))
    return h_NCHW if shift_NC is None else h_NCHW + _per_channel(shift_NC, wide)


def _per_channel(value_NC, dtype):
    return value_NC.to(dtype)[:, :, None, None]


def memory_format_of(x_NCHW):
    """Channels-last if the channel axis has stride 1, which includes slices of channels-last tensors."""
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
    Case("odd_map", (2, 64, 7, 7), 8, "49 pixels: rows that do not fill a tile"),
    Case("one_image", (1, 64, 16, 16), 32, "one image: the sum over images has one term"),
    Case("group_is_channel", (2, 32, 8, 8), 32, "C = G: instance norm, and a weight gradient far from the bias's"),
    Case("one_group", (2, 24, 5, 6), 1, "G = 1: the whole image is one slab; 24 channels do not fill a tile"),
    Case("three_per_group", (2, 96, 6, 6), 32, "C = 96 with 32 groups: 3 channels per group"),
    Case("ten_per_group", (1, 320, 4, 4), 32, "Stable Diffusion's 320 channels: 10 per group"),
    Case("one_pixel", (3, 64, 1, 1), 8, "a 1x1 map: variance over the group's channels alone"),
    Case("chunks", (2, 64, 40, 41), 32, "larger than one program holds: partial statistics merged, ragged last chunk"),
    Case("chunks_odd_groups", (1, 96, 45, 37), 32, "chunks with 3 channels per group"),
    Case("idle_lanes", (2, 192, 6, 6), 32, "several programs per image, whose idle lanes fall on another's channels"),
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

# ----------------------------------------------------------------------------------------------------- operators


def _cut(shape, itemsize, groups, in_turns, room=WHOLE_ELEMENTS) -> tuple[Tiling, bool]:
    """How a call is cut, and whether its programs take turns: not for maps that fit on chip or exceed the cache."""
    _, channels, height, width = shape
    of_one_image = (channels, groups, height * width, itemsize, room)
    cut = tiling(*of_one_image, in_turns=in_turns)
    if in_turns and cut.chunks and fits_the_cache(cut, height * width, itemsize):
        return cut, True
    return tiling(*of_one_image), False


def _turns(cut, shape, x_NCHW, spans):
    """Grid and arguments of a launch in turns."""
    images, _, height, width = shape
    slabs = images * spans
    ahead = slabs_ahead(cut, slabs, height * width, x_NCHW.element_size())
    turns = torch.zeros(1 + slabs, dtype=torch.int32, device=x_NCHW.device)
    return (2 * slabs * cut.chunks,), {"turns": turns, "spans": spans, "slabs": slabs, "ahead": ahead}


def _is_flat(image_NCHW):
    """Whether one stride steps through all pixels, across rows too, so that a pixel's address needs no division."""
    return image_NCHW.shape[2] == 1 or image_NCHW.stride(2) == image_NCHW.shape[3] * image_NCHW.stride(3)


def _dense(shape, memory_format, x_NCHW):
    """A new image in this memory format and x's type: the tensor for the kernel, and its view of shape (N, C, H, W).

    Inductor leaves only a contiguous torch.empty uninitialised: any other it fills, or shares and copies.
    """
    images, channels, height, width = shape
    if memory_format == torch.channels_last:
        storage_NHWC = torch.empty(images, height, width, channels, dtype=x_NCHW.dtype, device=x_NCHW.device)
        return storage_NHWC, storage_NHWC.permute(0, 3, 1, 2)
    storage_NCHW = torch.empty(images, channels, height, width, dtype=x_NCHW.dtype, device=x_NCHW.device)
    return storage_NCHW, storage_NCHW


def _strides(name, image_NCHW):
    return {f"{name}_{axis}": stride for axis, stride in zip("nchw", image_NCHW.stride())}


def _dense_strides(name, image_NCHW):
    return {f"{name}_{axis}": image_NCHW.stride(index) for axis, index in (("n", 0), ("c", 1), ("w", 3))}


def _modulation(weight_C, add_NC, scale_NC, shift_NC):
    """Pointer, stride and switch for each optional per-image value; an absent one gets a placeholder pointer."""
    arguments = {}
    for name, value in _named(add_NC, scale_NC, shift_NC).items():
        value = _unit_stride(value)
        arguments[name] = weight_C if value is None else value
        arguments[f"{name}_n"] = 0 if value is None else value.stride(0)
        arguments[name.upper()] = value is not None
    return arguments


def _unit_stride(values):
    """Per-channel values made contiguous: at a few kilobytes, they are not worth a stride argument in every kernel."""
    return values if values is None or values.stride(-1) == 1 else values.contiguous()


def _sizes(shape, groups):
    _, channels, height, width = shape
    return {"channels": channels, "groups": groups, "pixels": height * width, "width": width}


def _blocks(cut, per_group):
    blocks = {"SPAN": cut.span, "PER_GROUP": per_group, "BLOCK_R": cut.block_r, "BLOCK_C": cut.block_c}
    return blocks | {"num_warps": cut.warps}


def _shape(x_NCHW, skip_NCHW):
    """The shape of the whole image, which may come in two parts."""
    images, channels, height, width = x_NCHW.shape
    return images, channels if skip_NCHW is None else channels + skip_NCHW.shape[1], height, width


def _parts(weight_C, border, **tensors):
    """Arguments for an image in two parts, the second starting at channel `border`; placeholders if `border` is 0."""
    return (tensors if border else dict.fromkeys(tensors, weight_C)) | {"border": border, "JOIN": border > 0}


# Defined before the operators, because torch looks for their kernels when it registers them.
def _launch_forward(cut, in_turns, shared, parts, output, x_NCHW, y_NCHW, joined_NCHW):
    """One launch if a program holds a whole slab or programs take turns; else one for statistics and one for y."""
    (images, channels), groups = y_NCHW.shape[:2], shared["groups"]
    spans = math.ceil(channels / cut.span)
    if not cut.chunks:
        launch(NAME, wrap_triton(forward_whole), (spans, images), shared | parts | output)
        return
    shared |= {"rows": cut.rows, "chunks": cut.chunks}
    shared["partial"] = torch.empty(images, cut.chunks, 2, groups, dtype=torch.float32, device=x_NCHW.device)
    output["BLOCK_K"] = power_of_2(cut.chunks)
    if in_turns:
        grid, turns = _turns(cut, y_NCHW.shape, x_NCHW, spans)
        launch(NAME, wrap_triton(forward_in_turn), grid, shared | parts | output | turns)
        return
    grid = (spans, cut.chunks, images)
    first = {name: output[name] for name in ("add", "add_n", "ADD")} | _dense_strides("y", y_NCHW)
    launch(NAME, wrap_triton(forward_statistics), grid, shared | parts | first)
    if joined_NCHW is not None:
        shared |= {"x": parts["joined"]} | _strides("x", joined_NCHW)
    launch(NAME, wrap_triton(forward_apply), grid, shared | output)


def _launch_backward(cut, in_turns, shared, output, x_NCHW):
    """As in forward: one launch, or one for the sums over pixels and one for dx."""
    (images, channels), groups = x_NCHW.shape[:2], shared["groups"]
    spans = math.ceil(channels / cut.span)
    if not cut.chunks:
        launch(NAME, wrap_triton(backward_whole), (spans, images), shared | output)
        return
    shared |= {"rows": cut.rows, "chunks": cut.chunks}
    shared["partial"] = torch.empty(images, cut.chunks, 3, channels, dtype=torch.float32, device=x_NCHW.device)
    output["BLOCK_K"] = power_of_2(cut.chunks)
    if in_turns:
        grid, turns = _turns(cut, x_NCHW.shape, x_NCHW, spans)
        turns["of_group"] = torch.empty(images, 2, groups, dtype=torch.float32, device=x_NCHW.device)
        launch(NAME, wrap_triton(backward_in_turn), grid, shared | output | turns)
        return
    grid = (spans, cut.chunks, images)
    launch(NAME, wrap_triton(backward_sums), grid, shared)
    launch(NAME, wrap_triton(backward_apply), grid, shared | output)


@triton_op("duotone::group_norm_silu", mutates_args={})
def _forward(
    x_NCHW: Tensor,
    skip_NCHW: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    add_NC: Tensor | None,
    scale_NC: Tensor | None,
    shift_NC: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    in_turns: bool,
) -> list[Tensor]:
    """y, means, reciprocal standard deviations, and with a skip the joined image."""
    shape = _shape(x_NCHW, skip_NCHW)
    images, channels = shape[:2]
    cut, in_turns = _cut(shape, x_NCHW.element_size(), groups, in_turns)
    memory_format = memory_format_of(x_NCHW) if skip_NCHW is None else torch.channels_last
    y, y_NCHW = _dense(shape, memory_format, x_NCHW)
    joined, joined_NCHW = (None, None) if skip_NCHW is None else _dense(shape, memory_format, x_NCHW)
    mean_NG = torch.empty(images, groups, dtype=torch.float32, device=x_NCHW.device)
    rstd_NG = torch.empty(images, groups, dtype=torch.float32, device=x_NCHW.device)
    results = [y_NCHW, mean_NG, rstd_NG] if skip_NCHW is None else [y_NCHW, mean_NG, rstd_NG, joined_NCHW]
    modulation = _modulation(weight_C, add_NC, scale_NC, shift_NC)
    shared = _sizes(shape, groups) | _strides("x", x_NCHW) | _blocks(cut, channels // groups)
    shared |= {"x": x_NCHW, "FLAT": skip_NCHW is not None or _is_flat(x_NCHW), "BLOCK_G": cut.block_g}
    parts = _parts(weight_C, 0 if skip_NCHW is None else x_NCHW.shape[1], skip=skip_NCHW, joined=joined)
    output = {"weight": _unit_stride(weight_C), "bias": _unit_stride(bias_C), "y": y}
    output |= {"mean": mean_NG, "rstd": rstd_NG}
    output |= modulation | _dense_strides("y", y_NCHW) | {"eps": eps, "SILU": silu}
    _launch_forward(cut, in_turns, shared, parts, output, x_NCHW, y_NCHW, joined_NCHW)
    return results


@triton_op("duotone::group_norm_silu_backward", mutates_args={})
def _backward(
    dy_NCHW: Tensor,
    djoined_NCHW: Tensor | None,
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    add_NC: Tensor | None,
    scale_NC: Tensor | None,
    shift_NC: Tensor | None,
    mean_NG: Tensor,
    rstd_NG: Tensor,
    border: int,
    groups: int,
    silu: bool,
    in_turns: bool,
) -> list[Tensor]:
    """Gradients of x, weight and bias, of add, scale and shift (empty if absent), and of the skip if there is one."""
    images, channels, height, width = x_NCHW.shape
    is_plain = add_NC is None and scale_NC is None and shift_NC is None
    room = WHOLE_ELEMENTS if is_plain else WHOLE_ELEMENTS_MODULATED_BACKWARD
    cut, in_turns = _cut(x_NCHW.shape, x_NCHW.element_size(), groups, in_turns, room)
    first, second = (border, channels - border) if border else (channels, 0)
    dx, dx_NCHW = _dense((images, first, height, width), memory_format_of(x_NCHW), x_NCHW)
    dskip, dskip_NCHW = (
        _dense((images, second, height, width), memory_format_of(x_NCHW), x_NCHW) if border else (None, None)
    )
    per_image_N2C = torch.empty(images, 2, channels, dtype=torch.float32, device=x_NCHW.device)
    small = {f"d{name}": _gradient_like(value, x_NCHW) for name, value in _named(add_NC, scale_NC, shift_NC).items()}
    modulation = _modulation(weight_C, add_NC, scale_NC, shift_NC)
    shared = _sizes(x_NCHW.shape, groups) | _blocks(cut, channels // groups)
    shared |= _strides("x", x_NCHW) | _strides("dy", dy_NCHW)
    shared |= {"x": x_NCHW, "dy": dy_NCHW, "weight": _unit_stride(weight_C), "bias": _unit_stride(bias_C)}
    shared |= {"mean": mean_NG, "rstd": rstd_NG}
    shared |= modulation | {"SILU": silu, "FLAT": _is_flat(x_NCHW), "FLAT_DY": _is_flat(dy_NCHW)}
    output = {"dx": dx, "per_image": per_image_N2C, "BLOCK_G": cut.block_g} | _dense_strides("dx", dx_NCHW) | small
    output |= _parts(weight_C, border, djoined=djoined_NCHW, dskip=dskip)
    _launch_backward(cut, in_turns, shared, output, x_NCHW)
    results = [dx_NCHW, per_image_N2C.sum(dim=0), small["dadd"], small["dscale"], small["dshift"]]
    return [*results, dskip_NCHW] if border else results


def _named(add_NC, scale_NC, shift_NC):
    return {"add": add_NC, "scale": scale_NC, "shift": shift_NC}


def _gradient_like(value_NC, x_NCHW):
    if value_NC is None:
        return torch.empty(0, dtype=torch.float32, device=x_NCHW.device)
    return torch.empty(value_NC.shape, dtype=value_NC.dtype, device=x_NCHW.device)


def _save(ctx, inputs, output):
    x_NCHW, skip_NCHW, weight_C, bias_C, add_NC, scale_NC, shift_NC, ctx.groups, _, ctx.silu, ctx.in_turns = inputs
    _, mean_NG, rstd_NG, *joined = output
    ctx.border = x_NCHW.shape[1] if joined else 0
    whole_NCHW = joined[0] if joined else x_NCHW
    ctx.save_for_backward(whole_NCHW, weight_C, bias_C, add_NC, scale_NC, shift_NC, mean_NG, rstd_NG)


def _differentiate(ctx, gradients):
    saved, options = ctx.saved_tensors, (ctx.border, ctx.groups, ctx.silu, ctx.in_turns)
    dy_NCHW, _, _, *djoined = gradients
    if exceeds_32_bit_offsets(dy_NCHW):
        dy_NCHW = dy_NCHW.contiguous(memory_format=torch.channels_last)
    djoined_NCHW = djoined[0].contiguous(memory_format=torch.channels_last) if djoined else None
    dx_NCHW, dweight_bias_2C, *rest = _backward(dy_NCHW, djoined_NCHW, *saved, *options)
    dskip_NCHW = rest.pop() if ctx.border else None
    dweight_C, dbias_C = _each_as(dweight_bias_2C, *saved[1:3])
    dadd, dscale, dshift = (None if value is None else gradient for gradient, value in zip(rest, saved[3:6]))
    return dx_NCHW, dskip_NCHW, dweight_C, dbias_C, dadd, dscale, dshift, *4 * (None,)


def _each_as(dweight_bias_2C, weight_C, bias_C):
    """Gradients of weight and bias in their own types, with a single cast if both types are the same."""
    if weight_C.dtype == bias_C.dtype:
        return dweight_bias_2C.to(weight_C.dtype).unbind()
    dweight_C, dbias_C = dweight_bias_2C
    return dweight_C.to(weight_C.dtype), dbias_C.to(bias_C.dtype)


_forward.register_autograd(_differentiate, setup_context=_save)

# -------------------------------------------------------------------------------------------------------- public


def group_norm_silu(
    x_NCHW, weight_C, bias_C, groups, eps=1e-5, *, shift_NC=None, scale_NC=None, add_NC=None, silu=True, in_turns=False
):
    """Normalise, modulate and activate in one operation; channels-last in, channels-last out.

    Weights and modulation may have another floating type than the image. With `in_turns`, maps too large for one
    program take one launch instead of two (duotone.kernels.turns): the same numbers but for the order of sums. Raises
    ValueError on shapes, groups or devices that do not fit.
    """
    require(x_NCHW.dim() == 4, "x_NCHW", "4-dimensional", tuple(x_NCHW.shape))
    modulation = {"shift_NC": shift_NC, "scale_NC": scale_NC, "add_NC": add_NC}
    _validate(x_NCHW.shape, x_NCHW, weight_C, bias_C, groups, modulation)
    reason = _unsupported(x_NCHW.shape, x_NCHW.dtype, groups) if runs_kernel(NAME, x_NCHW) else ""
    if reason is None and exceeds_32_bit_offsets(x_NCHW):
        reason = "an image whose pixels are farther apart than a program can address"
    if reason:
        count_fallback(NAME, reason, *x_NCHW.shape)
    elif reason is None:
        return _forward(x_NCHW, None, weight_C, bias_C, add_NC, scale_NC, shift_NC, groups, eps, silu, in_turns)[0]
    return group_norm_silu_reference(
        x_NCHW, weight_C, bias_C, groups, eps, shift_NC=shift_NC, scale_NC=scale_NC, add_NC=add_NC, silu=silu
    )


def joined_group_norm_silu(
    x_NCHW,
    skip_NCHW,
    weight_C,
    bias_C,
    groups,
    eps=1e-5,
    *,
    shift_NC=None,
    scale_NC=None,
    add_NC=None,
    silu=True,
    in_turns=False,
):
    """group_norm_silu of x and a skip joined along channels, and the joined image, which the norm writes as it reads.

    C counts the channels of both. x and the skip each get a dense gradient, to which the norm adds the joined image's
    own gradient. Raises ValueError as group_norm_silu does.
    """
    _validate_parts(x_NCHW, skip_NCHW)
    reason = _not_read_apart(x_NCHW, skip_NCHW, groups) if runs_kernel(NAME, x_NCHW) else ""
    if reason is None:
        modulation = {"add_NC": add_NC, "scale_NC": scale_NC, "shift_NC": shift_NC}
        _validate(_shape(x_NCHW, skip_NCHW), x_NCHW, weight_C, bias_C, groups, modulation)
        parameters = (weight_C, bias_C, *modulation.values(), groups, eps, silu, in_turns)
        y_NCHW, _, _, joined_NCHW = _forward(x_NCHW, skip_NCHW, *parameters)
        return y_NCHW, joined_NCHW
    if reason:
        count_fallback(NAME, reason, *x_NCHW.shape)
    joined_NCHW = torch.cat([x_NCHW, skip_NCHW], dim=1)
    options = {"shift_NC": shift_NC, "scale_NC": scale_NC, "add_NC": add_NC, "silu": silu, "in_turns": in_turns}
    return group_norm_silu(joined_NCHW, weight_C, bias_C, groups, eps, **options), joined_NCHW


def _not_read_apart(x_NCHW, skip_NCHW, groups):
    """The reason why the norm cannot join two images itself, or None."""
    if x_NCHW.dtype != skip_NCHW.dtype:
        return "an image and a skip of different types"
    if not all(part.is_contiguous(memory_format=torch.channels_last) for part in (x_NCHW, skip_NCHW)):
        return "an image and a skip that are not both dense and channels-last"
    return _unsupported(_shape(x_NCHW, skip_NCHW), x_NCHW.dtype, groups)


def _validate_parts(x_NCHW, skip_NCHW):
    for name, part in {"x_NCHW": x_NCHW, "skip_NCHW": skip_NCHW}.items():
        require(part.dim() == 4 and part.shape[1] > 0, name, "4-dimensional, with channels", tuple(part.shape))
    images, _, height, width = x_NCHW.shape
    fits = (skip_NCHW.shape[0], *skip_NCHW.shape[2:]) == (images, height, width)
    require(fits, "skip_NCHW", f"({images}, channels, {height}, {width})", tuple(skip_NCHW.shape))
    require_same_device("skip_NCHW", skip_NCHW, x_NCHW)


def _unsupported(shape, dtype, groups):
    """The reason why the kernel cannot take this call, or None."""
    images, channels, height, width = shape
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{dtype} images"
    if 0 in shape:
        return "an empty image"
    if channels // groups > 4096:
        return "more than 4096 channels per group"
    if images > 65535 or channels * height * width >= 2**31:
        return "more images or pixels than a grid can address"
    return None


def _validate(shape, x_NCHW, weight_C, bias_C, groups, modulation):
    require(x_NCHW.is_floating_point(), "x_NCHW", "a floating-point tensor", x_NCHW.dtype)
    images, channels = shape[:2]
    require(groups > 0 and channels % groups == 0, "groups", f"a positive divisor of {channels} channels", groups)
    for name, value in {"weight_C": weight_C, "bias_C": bias_C}.items():
        require(tuple(value.shape) == (channels,), name, f"of shape ({channels},)", tuple(value.shape))
        require_same_device(name, value, x_NCHW)
    for name, value in modulation.items():
        if value is not None:
            require(tuple(value.shape) == (images, channels), name, f"({images}, {channels})", tuple(value.shape))
            require_same_device(name, value, x_NCHW)
