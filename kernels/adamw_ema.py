"""AdamW on a flat shard, every EMA track moved towards the new weights, and the bf16 copy, in one pass over memory.

Bytes per parameter with fp32 gradients and no EMA: read 16, written 12; each EMA track adds 8, the bf16 weights add 2.
Loshchilov and Hutter 2019, algorithm 2, as in torch.optim.AdamW, except that decay and step are subtracted together:
where lr * decay is below 3e-8, 1 - lr * decay rounds to 1 in fp32 and would decay nothing. P parameters.
"""

import math
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

NAME = "adamw_ema"

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
    """The definition in plain PyTorch, in place; `step` counts from 1, and a `grad_scale` of NaN skips the step."""
    if grad_scale != grad_scale:
        return
    beta1, beta2 = betas
    grad_P = grad_P.to(master_P.dtype) * grad_scale
    exp_avg_P.lerp_(grad_P, 1 - beta1)
    exp_avg_sq_P.mul_(beta2).addcmul_(grad_P, grad_P, value=1 - beta2)
    root_correction = (1 - beta2**step) ** 0.5
    denominator_P = (exp_avg_sq_P.sqrt() / root_correction).add_(eps)
    step_P = (exp_avg_P / denominator_P).mul_(1 / (1 - beta1**step)).add_(master_P, alpha=weight_decay)
    master_P.sub_(step_P.mul_(lr))
    for ema_P, decay in zip(emas, ema_decays, strict=True):
        ema_P.add_((master_P - ema_P).mul_(1 - decay))
    if weights_out is not None:
        weights_out.copy_(master_P)


# --------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One shard worth testing and timing, and why."""

    name: str
    parameters: int
    why: str
    tracks: int = 1
    weights: torch.dtype | None = torch.bfloat16
    grad: torch.dtype = torch.float32
    timed: bool = False


CASES = [
    Case("odd", 4099, "a prime: the last program is not full", tracks=2),
    Case("plain", 1024, "AdamW alone", tracks=0, weights=None),
    Case("half_gradients", 3000, "bf16 gradients, as they leave the backward pass", grad=torch.bfloat16),
    Case("one", 1, "a shard of one parameter", tracks=1, weights=torch.float16),
    Case("one_short", 2047, "one short of two programs: the last must not count as full"),
    Case("network", 109_466_115, "the reference network on one device", grad=torch.bfloat16, timed=True),
    Case("two_tracks", 109_466_115, "with a second EMA track", tracks=2, grad=torch.bfloat16, timed=True),
    Case("shard_of_8", 13_683_265, "1/8 of the network: ZeRO stage 1 on 8 devices", grad=torch.bfloat16, timed=True),
]

# --------------------------------------------------------------------------------------------------- device code
# fmt: off


@triton.jit
def _debias(log_beta, step):
    """1 - beta ** step without cancellation: summed as a series where it is small."""
    y = log_beta * step
    series = -y * (1.0 + y / 2.0 * (1.0 + y / 3.0 * (1.0 + y / 4.0 * (1.0 + y / 5.0 * (1.0 + y / 6.0)))))
    return tl.where(y > -0.25, series, 1.0 - tl.exp(y))


@triton.jit
def _read(array, at_P, parameters, FULL: tl.constexpr):
    if FULL:
        return tl.load(array + at_P).to(tl.float32)
    else:
        return tl.load(array + at_P, mask=at_P < parameters, other=0.0).to(tl.float32)


@triton.jit
def _write(array, value_P, at_P, parameters, FULL: tl.constexpr):
    if FULL:
        tl.store(array + at_P, value_P.to(array.dtype.element_ty))
    else:
        tl.store(array + at_P, value_P.to(array.dtype.element_ty), mask=at_P < parameters)


@triton.jit
def _update(
    master, grad, exp_avg, exp_avg_sq, first, second, weights,
    rate, scale, first_share, second_share, correction1, correction2,
    at_P, parameters, share1, share2, eps, weight_decay,
    TRACKS: tl.constexpr, WEIGHTS: tl.constexpr, FULL: tl.constexpr,
):
    grad_P = _read(grad, at_P, parameters, FULL) * scale
    average_P = _read(exp_avg, at_P, parameters, FULL)
    average_P = average_P - share1 * average_P + share1 * grad_P
    square_P = _read(exp_avg_sq, at_P, parameters, FULL)
    square_P = square_P - share2 * square_P + share2 * grad_P * grad_P
    _write(exp_avg, average_P, at_P, parameters, FULL)
    _write(exp_avg_sq, square_P, at_P, parameters, FULL)

    master_P = _read(master, at_P, parameters, FULL)
    denominator_P = tl.sqrt(square_P) / tl.sqrt(correction2) + eps
    master_P -= rate * (average_P / denominator_P / correction1 + weight_decay * master_P)
    _write(master, master_P, at_P, parameters, FULL)
    if TRACKS > 0:
        ema_P = _read(first, at_P, parameters, FULL)
        _write(first, ema_P + first_share * (master_P - ema_P), at_P, parameters, FULL)
    if TRACKS > 1:
        ema_P = _read(second, at_P, parameters, FULL)
        _write(second, ema_P + second_share * (master_P - ema_P), at_P, parameters, FULL)
    if WEIGHTS:
        _write(weights, master_P, at_P, parameters, FULL)


@triton.jit
def _kernel(
    master, grad, exp_avg, exp_avg_sq, first, second, weights, numbers,
    parameters, log_beta1, log_beta2, share1, share2, eps, weight_decay,
    TRACKS: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):
    """`numbers` holds (lr, step, grad_scale, 1 - decay of each track); a captured graph reads new values there."""
    # torch.compile passes Python numbers as fp64, which would promote everything computed with them.
    log_beta1, log_beta2 = tl.cast(log_beta1, tl.float32), tl.cast(log_beta2, tl.float32)
    share1, share2 = tl.cast(share1, tl.float32), tl.cast(share2, tl.float32)
    eps, weight_decay = tl.cast(eps, tl.float32), tl.cast(weight_decay, tl.float32)
    first_of_block = tl.program_id(0).to(tl.int64) * BLOCK
    at_P = first_of_block + tl.arange(0, BLOCK)
    rate, count, scale = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    towards_first, towards_second = tl.load(numbers + 3), tl.load(numbers + 4)
    correction1, correction2 = _debias(log_beta1, count), _debias(log_beta2, count)
    # A scale of NaN marks a step to skip; only the device knows it.
    if scale == scale:
        # A mask that may end anywhere would prevent vectorized access, so only the last program uses one.
        if first_of_block + BLOCK <= parameters:
            _update(
                master, grad, exp_avg, exp_avg_sq, first, second, weights,
                rate, scale, towards_first, towards_second, correction1, correction2,
                at_P, parameters, share1, share2, eps, weight_decay, TRACKS, WEIGHTS, True,
            )
        else:
            _update(
                master, grad, exp_avg, exp_avg_sq, first, second, weights,
                rate, scale, towards_first, towards_second, correction1, correction2,
                at_P, parameters, share1, share2, eps, weight_decay, TRACKS, WEIGHTS, False,
            )


# fmt: on

# ----------------------------------------------------------------------------------------------------- operators

_BLOCK = 1024


@triton_op("duotone::adamw_ema_", mutates_args={"master_P", "exp_avg_P", "exp_avg_sq_P", "emas", "weights_out"})
def _launch(
    master_P: Tensor,
    grad_P: Tensor,
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    emas: list[Tensor],
    weights_out: Tensor | None,
    numbers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    tracks = [*emas, master_P, master_P][:2]
    tensors = {"master": master_P, "grad": grad_P, "exp_avg": exp_avg_P, "exp_avg_sq": exp_avg_sq_P}
    tensors |= {"first": tracks[0], "second": tracks[1], "weights": master_P if weights_out is None else weights_out}
    constants = {"log_beta1": _logarithm(beta1), "log_beta2": _logarithm(beta2), "eps": eps}
    constants |= {"share1": 1 - beta1, "share2": 1 - beta2, "weight_decay": weight_decay}
    switches = {"TRACKS": len(emas), "WEIGHTS": weights_out is not None, "BLOCK": _BLOCK, "num_warps": 4}
    parameters = master_P.numel()
    arguments = tensors | {"numbers": numbers} | constants | switches | {"parameters": parameters}
    launch(NAME, wrap_triton(_kernel), (-(-parameters // _BLOCK),), arguments)


def _logarithm(beta):
    return math.log(beta) if beta > 0 else -1e30


def _numbers(lr, step, grad_scale, decays, device):
    """(lr, step, grad_scale, 1 - decay of each track) as fp32 on the device; 1 - decay is computed in fp64 first."""
    values = [lr, step, grad_scale, *(1.0 - decay for decay in decays), 0.0, 0.0][:5]
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=torch.float32, device=device)
    placed = [v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=device) for v in values]
    return torch.stack([value.double() for value in placed]).float()


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
    that a captured graph can be replayed with new values; a `grad_scale` of NaN leaves everything as it was. Raises
    ValueError if a shape, type, device or number does not fit.
    """
    _validate(master_P, grad_P, {"exp_avg_P": exp_avg_P, "exp_avg_sq_P": exp_avg_sq_P}, emas, ema_decays, weights_out)
    _validate_numbers(betas, {"lr": lr, "step": step, "grad_scale": grad_scale}, ema_decays, master_P)
    reason = _unsupported(grad_P, weights_out) if runs_kernel(NAME, master_P) else ""
    if reason is None:
        numbers = _numbers(lr, step, grad_scale, ema_decays, master_P.device)
        constants = (*betas, float(eps), float(weight_decay))
        _launch(master_P, grad_P, exp_avg_P, exp_avg_sq_P, list(emas), weights_out, numbers, *constants)
        return
    if reason:
        count_fallback(NAME, reason, *master_P.shape)
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": step}
    options |= {"grad_scale": grad_scale, "ema_decays": ema_decays, "weights_out": weights_out}
    adamw_ema_reference_(master_P, grad_P, exp_avg_P, exp_avg_sq_P, emas, **options)


def _unsupported(grad_P, weights_out):
    """The reason why the kernel cannot take this call, or None."""
    if grad_P.numel() == 0:
        return "an empty shard"
    for name, value in {"gradients": grad_P, "weights": weights_out}.items():
        if value is not None and value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"{value.dtype} {name}"
    return None


def _validate(master_P, grad_P, state, emas, ema_decays, weights_out):
    require(master_P.dim() == 1, "master_P", "flat", tuple(master_P.shape))
    require(len(emas) <= 2, "emas", "at most two tracks", len(emas))
    require(len(emas) == len(ema_decays), "ema_decays", f"{len(emas)} values, one per track", len(ema_decays))
    for name, value in (state | {f"emas[{i}]": ema for i, ema in enumerate(emas)} | {"master_P": master_P}).items():
        require(value.dtype == torch.float32, name, "float32", value.dtype)
        _require_like(name, value, master_P)
    for name, value in {"grad_P": grad_P, "weights_out": weights_out}.items():
        if value is not None:
            require(value.is_floating_point(), name, "of a floating-point type", value.dtype)
            _require_like(name, value, master_P)


def _validate_numbers(betas, numbers, ema_decays, master_P):
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", "two numbers from 0 to below 1", betas)
    for name, value in (numbers | {f"ema_decays[{i}]": decay for i, decay in enumerate(ema_decays)}).items():
        if isinstance(value, Tensor):
            require(value.dim() == 0, name, "a number or a 0-dimensional tensor", tuple(value.shape))
            require_same_device(name, value, master_P)
        elif name == "step":
            require(value >= 1, name, "at least 1", value)


def _require_like(name, value_P, master_P):
    require(value_P.shape == master_P.shape, name, f"of shape {tuple(master_P.shape)}", tuple(value_P.shape))
    require(value_P.numel() < 2 or value_P.stride(0) == 1, name, "contiguous", f"stride {value_P.stride()}")
    require_same_device(name, value_P, master_P)
