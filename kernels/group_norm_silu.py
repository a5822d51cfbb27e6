"""y = silu(GroupNorm(x + add) * (1 + scale) + shift): x is read once and y written once where a slab fits on chip.

N images, C channels, H x W pixels, G groups. Statistics, scale and shift are fp32 whatever the image's type.
Wu and He 2018 (group normalisation), Perez et al. 2018 (FiLM), Elfwing et al. 2018 (SiLU).
"""

import torch
import torch.nn.functional as F

from duotone.kernels.dispatch import require, require_same_device

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


# -------------------------------------------------------------------------------------------------------- public


def group_norm_silu(
    x_NCHW, weight_C, bias_C, groups, eps=1e-5, *, shift_NC=None, scale_NC=None, add_NC=None, silu=True
):
    """Normalise, modulate and activate in one operation; channels-last in, channels-last out.

    Weights and modulation may be of another floating type than the image. Raises ValueError on shapes, groups or
    devices that do not fit.
    """
    _validate(x_NCHW, weight_C, bias_C, groups, {"shift_NC": shift_NC, "scale_NC": scale_NC, "add_NC": add_NC})
    return group_norm_silu_reference(
        x_NCHW, weight_C, bias_C, groups, eps, shift_NC=shift_NC, scale_NC=scale_NC, add_NC=add_NC, silu=silu
    )


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
