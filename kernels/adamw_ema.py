"""AdamW on a flat shard, then every EMA track towards the new weights, then the bf16 copy: each array moves once.

Bytes per parameter with fp32 gradients and no EMA: read 16, written 12; each EMA track adds 8, the bf16 weights add 2.
Loshchilov and Hutter 2019, algorithm 2; the arithmetic is torch.optim.AdamW's. P parameters.
"""

import torch

from duotone.kernels.dispatch import require, require_same_device

# ---------------------------------------------------------------------------------------------------- definition


@torch.no_grad()
def adamw_ema_reference_(
    master_P,
    grad_P,
    exp_avg_P,
    exp_avg_sq_P,
    emas=(),
    *,
    lr,
    betas,
    eps,
    weight_decay,
    step,
    grad_scale=1.0,
    ema_decays=(),
    weights_out=None,
):
    """The definition in plain PyTorch, in place; `step` counts from 1."""
    beta1, beta2 = betas
    grad_P = grad_P.to(master_P.dtype) * grad_scale
    master_P.mul_(1 - lr * weight_decay)
    exp_avg_P.lerp_(grad_P, 1 - beta1)
    exp_avg_sq_P.mul_(beta2).addcmul_(grad_P, grad_P, value=1 - beta2)
    root_correction = (1 - beta2**step) ** 0.5
    denominator_P = (exp_avg_sq_P.sqrt() / root_correction).add_(eps)
    master_P.sub_((exp_avg_P / denominator_P).mul_(lr / (1 - beta1**step)))
    for ema_P, decay in zip(emas, ema_decays, strict=True):
        ema_P.add_((master_P - ema_P).mul_(1 - decay))
    if weights_out is not None:
        weights_out.copy_(master_P)


# -------------------------------------------------------------------------------------------------------- public


def adamw_ema_(
    master_P,
    grad_P,
    exp_avg_P,
    exp_avg_sq_P,
    emas=(),
    *,
    lr,
    betas,
    eps,
    weight_decay,
    step,
    grad_scale=1.0,
    ema_decays=(),
    weights_out=None,
):
    """Update flat fp32 tensors in place: AdamW on grad * grad_scale, up to two EMA tracks, optional 16-bit weights.

    `lr`, `step` (from 1), `grad_scale` and `ema_decays` are numbers or 0-dimensional tensors on the same device, so
    that a captured graph can be replayed with new values. Raises ValueError on what does not fit.
    """
    _validate(master_P, grad_P, {"exp_avg_P": exp_avg_P, "exp_avg_sq_P": exp_avg_sq_P}, emas, ema_decays, weights_out)
    adamw_ema_reference_(
        master_P,
        grad_P,
        exp_avg_P,
        exp_avg_sq_P,
        emas,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
        ema_decays=ema_decays,
        weights_out=weights_out,
    )


def _validate(master_P, grad_P, state, emas, ema_decays, weights_out):
    require(master_P.dim() == 1, "master_P", "flat", tuple(master_P.shape))
    require(len(emas) <= 2, "emas", "at most two tracks", len(emas))
    require(len(emas) == len(ema_decays), "ema_decays", f"{len(emas)} values, one per track", len(ema_decays))
    for name, value in (state | {f"emas[{i}]": ema for i, ema in enumerate(emas)} | {"master_P": master_P}).items():
        require(value.dtype == torch.float32, name, "float32", value.dtype)
        _require_like(name, value, master_P)
    _require_like("grad_P", grad_P, master_P)
    if weights_out is not None:
        _require_like("weights_out", weights_out, master_P)


def _require_like(name, value_P, master_P):
    require(value_P.shape == master_P.shape, name, f"of shape {tuple(master_P.shape)}", tuple(value_P.shape))
    require_same_device(name, value_P, master_P)
