"""input = a * x0 + b * noise, target = p * x0 + q * noise, from uint8 pixels: read once, both written once.

x0 = image / 127.5 - 1, mirrored where `flip` says so. The noise is f(seed, position, purpose), never stored.
N images, H x W pixels, C channels.
"""

import torch

from duotone.kernels.dispatch import require, require_same_device
from duotone.kernels.philox import normal_reference

# ---------------------------------------------------------------------------------------------------- definition


def diffuse_reference(images_NHWC, flip_N, coefficients_N4, seed, positions_N, purpose, *, dtype=torch.float32):
    """The definition in plain PyTorch; noise runs over (H, W, C) of the image as it is shown to the network."""
    x0_NHWC = images_NHWC.to(torch.float32) * (1 / 127.5) - 1
    x0_NHWC = torch.where(flip_N[:, None, None, None], x0_NHWC.flip(2), x0_NHWC)
    count = images_NHWC[0].numel()
    noise_NHWC = normal_reference(seed, positions_N, purpose, count).view(images_NHWC.shape)
    a, b, p, q = coefficients_N4.to(torch.float32)[:, :, None, None, None].unbind(dim=1)
    input_NHWC = (a * x0_NHWC + b * noise_NHWC).to(dtype)
    target_NHWC = p * x0_NHWC + q * noise_NHWC
    return input_NHWC.permute(0, 3, 1, 2), target_NHWC.permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------------------------------- public


def diffuse(images_NHWC, flip_N, coefficients_N4, seed, positions_N, purpose, *, dtype=torch.float32):
    """Channels-last network input in `dtype` and fp32 target from uint8 images; rows of coefficients are (a, b, p, q).

    `seed` is an integer of 64 bits, `positions_N` int64 images since the start of the run, `purpose` a small integer.
    Raises ValueError on shapes, types or devices that do not fit.
    """
    _validate(images_NHWC, flip_N, coefficients_N4, positions_N, dtype)
    return diffuse_reference(images_NHWC, flip_N, coefficients_N4, seed, positions_N, purpose, dtype=dtype)


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
