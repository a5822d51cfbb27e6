"""guided = D_uncond + scale * (D_cond - D_uncond) with D = c_skip * x + c_out * F: each tensor is read once.

One network call predicts both branches: the first half of F is conditional, the second half unconditional.
Ho and Salimans 2022, equation 6; Karras et al. 2022, equation 7; rescale by Lin et al. 2024, equations 14 to 16.
N images, C channels, H x W pixels.
"""

import torch

from duotone.kernels.dispatch import require, require_same_device

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
        ratio_N111 = _deviation(denoised_NCHW) / _deviation(guided_NCHW)
        guided_NCHW = guided_NCHW * (rescale * ratio_N111 + (1 - rescale))
    return torch.empty_like(x_NCHW).copy_(guided_NCHW)


def _deviation(image_NCHW):
    return image_NCHW.std(dim=(1, 2, 3), keepdim=True, correction=0)


# -------------------------------------------------------------------------------------------------------- public


def guided_step(prediction_2NCHW, x_NCHW, c_skip_N, c_out_N, scale_N, *, rescale=0.0):
    """Guided denoised images from the network's raw output for both branches and the noisy images x.

    `scale_N` is the guidance of each image (1 = conditional alone); `rescale` in [0, 1] pulls each image's standard
    deviation back to the conditional one's. Raises ValueError on shapes, types or devices that do not fit.
    """
    _validate(prediction_2NCHW, x_NCHW, {"c_skip_N": c_skip_N, "c_out_N": c_out_N, "scale_N": scale_N}, rescale)
    return guided_step_reference(prediction_2NCHW, x_NCHW, c_skip_N, c_out_N, scale_N, rescale=rescale)


def _validate(prediction_2NCHW, x_NCHW, per_image, rescale):
    require(x_NCHW.dim() == 4, "x_NCHW", "4-dimensional", tuple(x_NCHW.shape))
    require(x_NCHW.is_floating_point(), "x_NCHW", "a floating-point tensor", x_NCHW.dtype)
    images = x_NCHW.shape[0]
    doubled = (2 * images, *x_NCHW.shape[1:])
    shape = tuple(prediction_2NCHW.shape)
    require(shape == doubled, "prediction_2NCHW", f"of shape {doubled}", shape)
    require_same_device("prediction_2NCHW", prediction_2NCHW, x_NCHW)
    for name, value in per_image.items():
        require(tuple(value.shape) == (images,), name, f"of shape ({images},)", tuple(value.shape))
        require_same_device(name, value, x_NCHW)
    require(0 <= rescale <= 1, "rescale", "between 0 and 1", rescale)
