"""guided = D_uncond + scale * (D_cond - D_uncond) with D = c_skip * x + c_out * F: each tensor is read once.

One network call predicts both branches: the first half of F is conditional, the second half unconditional.
Ho and Salimans 2022, equation 6; Karras et al. 2022, equation 7; rescaling as in Lin et al. 2024, equations 14
to 16, needs a second read. N images, C channels, H x W pixels.
"""

from dataclasses import dataclass

import torch
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

NAME = "guided_step"

# ---------------------------------------------------------------------------------------------------- definition


def guided_step_reference(prediction_2NCHW, x_NCHW, c_skip_N, c_out_N, scale_N, *, rescale=0.0):
    """The definition in plain PyTorch, computed in fp32 (fp64 for fp64 images), returned in x's type and layout."""
    wide = torch.promote_types(x_NCHW.dtype, torch.float32)
    c_skip, c_out, scale = (value.to(wide)[:, None, None, None] for value in (c_skip_N, c_out_N, scale_N))
    conditional_NCHW, unconditional_NCHW = prediction_2NCHW.to(wide).chunk(2)
    x_wide_NCHW = x_NCHW.to(wide)
    mixed_NCHW = unconditional_NCHW + scale * (conditional_NCHW - unconditional_NCHW)
    guided_NCHW = c_skip * x_wide_NCHW + c_out * mixed_NCHW
    if rescale:
        denoised_NCHW = c_skip * x_wide_NCHW + c_out * conditional_NCHW
        of_N111 = _deviation(guided_NCHW)
        ratio_N111 = torch.where(of_N111 == 0, 1.0, _deviation(denoised_NCHW) / of_N111)  # flat: nothing to rescale
        guided_NCHW = guided_NCHW * (rescale * ratio_N111 + (1 - rescale))
    return torch.empty_like(x_NCHW).copy_(guided_NCHW)


def _deviation(image_NCHW):
    return (image_NCHW - image_NCHW[:, :1, :1, :1]).std(dim=(1, 2, 3), keepdim=True, correction=0)


# --------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One shape worth testing and timing, and why."""

    name: str
    shape: tuple[int, int, int, int]
    why: str
    rescale: float = 0.0
    timed: bool = False


CASES = [
    Case("colour", (3, 3, 16, 16), "one program per image"),
    Case("odd", (2, 5, 7, 9), "315 values: not a multiple of any block"),
    Case("rescaled", (2, 3, 24, 24), "two launches: one chunk's deviations, then the image", rescale=0.7),
    Case("rescaled_chunks", (2, 3, 40, 45), "deviations merged from two chunks, the last one ragged", rescale=1.0),
    Case("batch_128", (64, 3, 128, 128), "the reference network's batch", timed=True),
    Case("batch_128_rescaled", (64, 3, 128, 128), "the same with rescale", rescale=0.7, timed=True),
    Case("single_128", (1, 3, 128, 128), "one image: the launch is the whole cost", timed=True),
]

# --------------------------------------------------------------------------------------------------- device code
# V values of one image, flat in memory order; K chunks of an image.
# fmt: off


@triton.jit
def _denoised(prediction, x, c_skip, c_out, scale, image, images, value_V, real_V, values):
    """The conditional and the guided denoised values."""
    conditional_V = tl.load(prediction + image * values + value_V, mask=real_V, other=0.0).to(tl.float32)
    unconditional_V = tl.load(prediction + (images + image) * values + value_V, mask=real_V, other=0.0).to(tl.float32)
    skip_V = tl.load(c_skip + image).to(tl.float32) * tl.load(x + image * values + value_V, mask=real_V, other=0.0)
    out = tl.load(c_out + image).to(tl.float32)
    mixed_V = unconditional_V + tl.load(scale + image).to(tl.float32) * (conditional_V - unconditional_V)
    return skip_V + out * conditional_V, skip_V + out * mixed_V


@triton.jit
def _spread_of(value_V, real_V, count):
    first = tl.sum(tl.where(tl.arange(0, value_V.shape[0]) == 0, value_V, 0.0))
    from_first_V = tl.where(real_V, value_V - first, 0.0)  # exactly 0 where the chunk is flat
    mean = tl.sum(from_first_V) / count
    apart_V = tl.where(real_V, from_first_V - mean, 0.0)
    return first + mean, tl.sum(apart_V * apart_V)


@triton.jit
def _deviation_kernel(prediction, x, c_skip, c_out, scale, partial, images, values, chunks, BLOCK: tl.constexpr):
    """Mean and sum of centred squares of one chunk, for the conditional and for the guided image."""
    image = tl.program_id(1).to(tl.int64)
    value_V = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real_V = value_V < values
    denoised_V, guided_V = _denoised(prediction, x, c_skip, c_out, scale, image, images, value_V, real_V, values)
    count = tl.minimum(values - tl.program_id(0) * BLOCK, BLOCK).to(tl.float32)
    mean, square = _spread_of(denoised_V, real_V, count)
    guided_mean, guided_square = _spread_of(guided_V, real_V, count)
    slot = partial + (image * chunks + tl.program_id(0)) * 4
    tl.store(slot, mean)
    tl.store(slot + 1, square)
    tl.store(slot + 2, guided_mean)
    tl.store(slot + 3, guided_square)


@triton.jit
def _total_square(slot_K, real_K, count_K, values):
    """Sum of centred squares of a whole image, merged from its chunks (Chan, Golub and LeVeque 1979)."""
    mean_K = tl.load(slot_K, mask=real_K, other=0.0)
    from_first_K = tl.where(real_K, mean_K - tl.sum(tl.where(tl.arange(0, mean_K.shape[0]) == 0, mean_K, 0.0)), 0.0)
    apart_K = from_first_K - tl.sum(from_first_K * count_K) / values
    return tl.sum(tl.load(slot_K + 1, mask=real_K, other=0.0) + apart_K * apart_K * count_K)


@triton.jit
def _kernel(
    prediction, x, c_skip, c_out, scale, partial, guided, images, values, chunks, rescale,
    RESCALE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    value_V = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real_V = value_V < values
    _, guided_V = _denoised(prediction, x, c_skip, c_out, scale, image, images, value_V, real_V, values)
    if RESCALE:
        rescale = tl.cast(rescale, tl.float32)  # torch.compile passes Python numbers as fp64
        chunk_K = tl.arange(0, BLOCK_K)
        real_K = chunk_K < chunks
        count_K = tl.maximum(tl.minimum(values - chunk_K * BLOCK, BLOCK), 0).to(tl.float32)
        slot_K = partial + (image * chunks + chunk_K) * 4
        square = _total_square(slot_K, real_K, count_K, values)
        guided_square = _total_square(slot_K + 2, real_K, count_K, values)
        ratio = tl.sqrt(square / tl.where(guided_square == 0.0, 1.0, guided_square))
        ratio = tl.where(guided_square == 0.0, 1.0, ratio)  # flat: nothing to rescale
        guided_V *= rescale * ratio + (1.0 - rescale)
    tl.store(guided + image * values + value_V, guided_V.to(guided.dtype.element_ty), mask=real_V)


# fmt: on

# ----------------------------------------------------------------------------------------------------- operators

_BLOCK = 4096


@triton_op("duotone::guided_step", mutates_args={})
def _forward(
    prediction_2NCHW: Tensor, x_NCHW: Tensor, c_skip_N: Tensor, c_out_N: Tensor, scale_N: Tensor, rescale: float
) -> Tensor:
    guided_NCHW = torch.empty_like(x_NCHW)
    images, values = x_NCHW.shape[0], x_NCHW[0].numel()
    chunks = -(-values // _BLOCK)
    partial = torch.empty(images, chunks, 4, dtype=torch.float32, device=x_NCHW.device) if rescale else c_skip_N
    arguments = {"prediction": prediction_2NCHW, "x": x_NCHW, "c_skip": c_skip_N, "c_out": c_out_N, "scale": scale_N}
    arguments |= {"partial": partial, "images": images, "values": values, "chunks": chunks}
    arguments |= {"BLOCK": _BLOCK, "num_warps": 8}
    if rescale:
        launch(NAME, wrap_triton(_deviation_kernel), (chunks, images), arguments)
    arguments |= {"guided": guided_NCHW, "rescale": rescale, "RESCALE": rescale > 0}
    arguments |= {"BLOCK_K": 1 << (chunks - 1).bit_length()}
    launch(NAME, wrap_triton(_kernel), (chunks, images), arguments)
    return guided_NCHW


# -------------------------------------------------------------------------------------------------------- public


def guided_step(prediction_2NCHW, x_NCHW, c_skip_N, c_out_N, scale_N, *, rescale=0.0):
    """Guided denoised images from the network's raw output for both branches and the noisy images x.

    `scale_N` is each image's guidance scale (1 = conditional alone); `rescale` in [0, 1] pulls each image's standard
    deviation back towards that of the conditional image. Raises ValueError on shapes, types or devices that do not fit.
    """
    _validate(prediction_2NCHW, x_NCHW, {"c_skip_N": c_skip_N, "c_out_N": c_out_N, "scale_N": scale_N}, rescale)
    if runs_kernel(NAME, x_NCHW):
        reason = _unsupported(prediction_2NCHW, x_NCHW, c_skip_N, c_out_N, scale_N)
        if reason is None:
            return _forward(prediction_2NCHW, x_NCHW, c_skip_N, c_out_N, scale_N, float(rescale))
        count_fallback(NAME, reason, *x_NCHW.shape)
    return guided_step_reference(prediction_2NCHW, x_NCHW, c_skip_N, c_out_N, scale_N, rescale=rescale)


def _unsupported(prediction_2NCHW, x_NCHW, *per_image):
    """The reason why the kernel cannot take this call, or None."""
    tensors = (prediction_2NCHW, x_NCHW, *per_image)
    if any(t.dtype not in (torch.bfloat16, torch.float16, torch.float32) for t in tensors):
        return "a type other than bf16, fp16 and fp32"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "a gradient is needed"
    if x_NCHW.numel() == 0:
        return "an empty batch"
    if not _is_dense(x_NCHW) or not _is_dense(prediction_2NCHW) or _order(x_NCHW) != _order(prediction_2NCHW):
        return "x and the prediction differ in layout, or have gaps"
    if any(value.numel() > 1 and value.stride(0) != 1 for value in per_image):
        return "per-image values with gaps"
    too_many = x_NCHW.shape[0] > 65535 or x_NCHW[0].numel() >= 2**31
    return "more images or values than a grid can address" if too_many else None


def _is_dense(image_NCHW):
    """Whether the images follow each other without gaps, channels first or channels last."""
    return image_NCHW.is_contiguous() or image_NCHW.is_contiguous(memory_format=torch.channels_last)


def _order(image_NCHW):
    """Strides within one image, for the axes longer than 1."""
    return [stride for size, stride in list(zip(image_NCHW.shape, image_NCHW.stride()))[1:] if size > 1]


def _validate(prediction_2NCHW, x_NCHW, per_image, rescale):
    require(x_NCHW.dim() == 4, "x_NCHW", "4-dimensional", tuple(x_NCHW.shape))
    require(x_NCHW.is_floating_point(), "x_NCHW", "a floating-point tensor", x_NCHW.dtype)
    images = x_NCHW.shape[0]
    doubled = (2 * images, *x_NCHW.shape[1:])
    shape = tuple(prediction_2NCHW.shape)
    require(shape == doubled, "prediction_2NCHW", f"of shape {doubled}", shape)
    of_numbers = prediction_2NCHW.is_floating_point()
    require(of_numbers, "prediction_2NCHW", "a floating-point tensor", prediction_2NCHW.dtype)
    require_same_device("prediction_2NCHW", prediction_2NCHW, x_NCHW)
    for name, value in per_image.items():
        require(tuple(value.shape) == (images,), name, f"of shape ({images},)", tuple(value.shape))
        require_same_device(name, value, x_NCHW)
    require(0 <= rescale <= 1, "rescale", "between 0 and 1", rescale)
