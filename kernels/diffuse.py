"""input = a * x0 + b * noise, target = p * x0 + q * noise: the uint8 pixels are read once, both outputs written once.

x0 = image / 127.5 - 1, mirrored where `flip` is True. The noise is f(seed, position, purpose) and is never stored.
N images, H x W pixels, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.kernels.dispatch import (
    count_fallback,
    exceeds_32_bit_offsets,
    launch_exactly,
    require,
    require_same_device,
    runs_kernel,
    tl,
    triton,
)
from duotone.kernels.philox import normal_reference, normals

NAME = "diffuse"

# ---------------------------------------------------------------------------------------------------- definition


def diffuse_reference(images_NHWC, flip_N, coefficients_N4, seed, positions_N, purpose, *, dtype=torch.float32):
    """The definition in plain PyTorch; noise is drawn in (H, W, C) order of the image after mirroring."""
    # Divide by a tensor: for a Python number, the GPU multiplies by its rounded reciprocal instead.
    x0_NHWC = images_NHWC.to(torch.float32) / torch.full((), 127.5, device=images_NHWC.device) - 1
    x0_NHWC = torch.where(flip_N[:, None, None, None], x0_NHWC.flip(2), x0_NHWC)
    count = images_NHWC.shape[1:].numel()
    noise_NHWC = normal_reference(seed, positions_N, purpose, count).view(images_NHWC.shape)
    a, b, p, q = coefficients_N4.to(torch.float32)[:, :, None, None, None].unbind(dim=1)
    input_NHWC = (a * x0_NHWC + b * noise_NHWC).to(dtype)
    target_NHWC = p * x0_NHWC + q * noise_NHWC
    return input_NHWC.permute(0, 3, 1, 2), target_NHWC.permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One shape worth testing and timing, and why."""

    name: str
    shape: tuple[int, int, int, int]
    why: str
    timed: bool = False


CASES = [
    Case("colour", (3, 16, 16, 3), "three channels: a pixel straddles blocks of four draws"),
    Case("grey_odd", (2, 7, 9, 1), "63 values: the last block is not full"),
    Case("two_programs", (2, 32, 24, 3), "more values than one program writes"),
    Case("one_pixel", (1, 1, 1, 4), "one block"),
    Case("colour_128", (64, 128, 128, 3), "the reference network's batch", timed=True),
    Case("grey_28", (256, 28, 28, 1), "MNIST's batch", timed=True),
]

# --------------------------------------------------------------------------------------------------- device code
# fmt: off


@triton.jit(do_not_specialize=["seed", "purpose"])
def _kernel(
    images, flip, coefficients, positions, noisy, target,
    seed, purpose, values, width, channels,
    images_n, images_h, images_w, images_c,
    BLOCK: tl.constexpr,
):
    """BLOCK consecutive blocks of four values of one image; values are in (H, W, C) order of the mirrored image."""
    image = tl.program_id(1).to(tl.int64)
    block_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second, third, fourth = normals(seed, block_B, tl.load(positions + image), purpose)
    noise_V = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (4 * BLOCK,))
    value_V = tl.program_id(0) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    real_V = value_V < values

    channel_V = value_V % channels
    column_V = value_V // channels % width
    row_V = value_V // channels // width
    column_V = tl.where(tl.load(flip + image) != 0, width - 1 - column_V, column_V)
    from_V = images + image * images_n + row_V * images_h + column_V * images_w + channel_V * images_c
    x0_V = tl.div_rn(tl.load(from_V, mask=real_V, other=0).to(tl.float32), 127.5) - 1.0

    a = tl.load(coefficients + image * 4)
    b = tl.load(coefficients + image * 4 + 1)
    p = tl.load(coefficients + image * 4 + 2)
    q = tl.load(coefficients + image * 4 + 3)
    to_V = image * values + value_V
    tl.store(noisy + to_V, (a * x0_V + b * noise_V).to(noisy.dtype.element_ty), mask=real_V)
    tl.store(target + to_V, p * x0_V + q * noise_V, mask=real_V)


# fmt: on

# ----------------------------------------------------------------------------------------------------- operators
# A custom_op, not a triton_op: only a direct launch can turn off fused multiply-adds. Nothing here needs a gradient.


def _forward(
    images_NHWC: Tensor,
    flip_N: Tensor,
    coefficients_N4: Tensor,
    seed: int,
    positions_N: Tensor,
    purpose: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    images, height, width, channels = images_NHWC.shape
    values = height * width * channels
    noisy_NHWC = torch.empty(images_NHWC.shape, dtype=dtype, device=images_NHWC.device)
    target_NHWC = torch.empty(images_NHWC.shape, dtype=torch.float32, device=images_NHWC.device)
    arguments = {"images": images_NHWC, "flip": flip_N.contiguous(), "coefficients": coefficients_N4.contiguous()}
    arguments |= {"positions": positions_N.contiguous(), "noisy": noisy_NHWC, "target": target_NHWC, "seed": seed}
    arguments |= {"purpose": purpose, "values": values, "width": width, "channels": channels}
    arguments |= {f"images_{axis}": stride for axis, stride in zip("nhwc", images_NHWC.stride())}
    arguments |= {"BLOCK": 256, "num_warps": 4}
    launch_exactly(NAME, _kernel, (-(-values // 1024), images), arguments)
    return noisy_NHWC.permute(0, 3, 1, 2), target_NHWC.permute(0, 3, 1, 2)


_opaque = torch.library.custom_op("duotone::diffuse", _forward, mutates_args=())


@_opaque.register_fake
def _(images_NHWC, flip_N, coefficients_N4, seed, positions_N, purpose, dtype):
    noisy_NHWC = torch.empty(images_NHWC.shape, dtype=dtype, device=images_NHWC.device)
    return noisy_NHWC.permute(0, 3, 1, 2), torch.empty_like(noisy_NHWC, dtype=torch.float32).permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------------------------------- public


def diffuse(images_NHWC, flip_N, coefficients_N4, seed, positions_N, purpose, *, dtype=torch.float32):
    """Channels-last network input in `dtype` and fp32 target from uint8 images; rows of coefficients are (a, b, p, q).

    `seed` is a 64-bit integer, `positions_N` (int64) counts images since the start of the run, `purpose` is a small
    integer.
    Raises ValueError on shapes, types or devices that do not fit.
    """
    _validate(images_NHWC, flip_N, coefficients_N4, positions_N, dtype)
    if runs_kernel(NAME, images_NHWC):
        reason = _unsupported(images_NHWC, coefficients_N4, dtype)
        if reason is None:
            signed = (seed + 2**63) % 2**64 - 2**63
            run = _opaque if torch.compiler.is_compiling() else _forward
            return run(images_NHWC, flip_N, coefficients_N4, signed, positions_N, purpose, dtype)
        count_fallback(NAME, reason, *images_NHWC.shape)
    return diffuse_reference(images_NHWC, flip_N, coefficients_N4, seed, positions_N, purpose, dtype=dtype)


def _unsupported(images_NHWC, coefficients_N4, dtype):
    """The reason why the kernel cannot take this call, or None."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"input in {dtype}"
    if images_NHWC.numel() == 0:
        return "an empty batch"
    if coefficients_N4.requires_grad and torch.is_grad_enabled():
        return "a gradient is needed"
    if exceeds_32_bit_offsets(images_NHWC):
        return "an image whose pixels are farther apart than a program can address"
    too_many = images_NHWC.shape[0] > 65535 or images_NHWC[0].numel() >= 2**31
    return "more images or values than a grid can address" if too_many else None


def _validate(images_NHWC, flip_N, coefficients_N4, positions_N, dtype):
    require(images_NHWC.dim() == 4, "images_NHWC", "4-dimensional", tuple(images_NHWC.shape))
    require(images_NHWC.dtype == torch.uint8, "images_NHWC", "uint8", images_NHWC.dtype)
    require(dtype.is_floating_point, "dtype", "a floating-point type", dtype)
    images = images_NHWC.shape[0]
    fits = {"flip_N": (flip_N, (images,)), "coefficients_N4": (coefficients_N4, (images, 4))}
    for name, (value, shape) in (fits | {"positions_N": (positions_N, (images,))}).items():
        require(tuple(value.shape) == shape, name, f"of shape {shape}", tuple(value.shape))
        require_same_device(name, value, images_NHWC)
    require(flip_N.dtype == torch.bool, "flip_N", "boolean", flip_N.dtype)
    require(positions_N.dtype == torch.int64, "positions_N", "int64", positions_N.dtype)
    require(coefficients_N4.dtype == torch.float32, "coefficients_N4", "float32", coefficients_N4.dtype)
