"""The sum of squares of a flat gradient, for its norm: one pass, bit-identical from run to run.

The gradient is read once. Its length alone decides how it is cut into programs, and their sums are added in order, so a
repeated run gives the same norm. P parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.kernels.dispatch import count_fallback, launch, require, runs_kernel, tl, triton, triton_op, wrap_triton

NAME = "squared_norm"

# ---------------------------------------------------------------------------------------------------- definition


@torch.no_grad()
def squared_norm_reference(grad_P):
    """The definition in plain PyTorch: 0-dimensional, fp64."""
    return torch.linalg.vector_norm(grad_P, dtype=torch.float64).square()


# --------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One shard worth testing and timing, and why."""

    name: str
    parameters: int
    why: str
    grad: torch.dtype = torch.float32
    timed: bool = False


CASES = [
    Case("odd", 20_011, "a prime: the last program is not full"),
    Case("half_gradients", 9000, "bf16 gradients, as they leave the backward pass", grad=torch.bfloat16),
    Case("scaled_gradients", 9000, "fp16 gradients", grad=torch.float16),
    Case("one", 1, "a shard of one parameter"),
    Case("one_short", 8191, "one short of a program: it must not be treated as full"),
    Case("network", 109_466_115, "the reference network on one device", grad=torch.bfloat16, timed=True),
    Case("shard_of_8", 13_683_265, "1/8 of the network: ZeRO stage 1 on 8 devices", grad=torch.bfloat16, timed=True),
]

# --------------------------------------------------------------------------------------------------- device code


@triton.jit
def _kernel(grad, sums, parameters, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    sum_P = tl.zeros([BLOCK], tl.float32)
    if first + BLOCK * BLOCKS <= parameters:
        for block in tl.static_range(BLOCKS):
            grad_P = tl.load(grad + first + block * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
            sum_P += grad_P * grad_P
    else:
        for block in tl.static_range(BLOCKS):
            at_P = first + block * BLOCK + tl.arange(0, BLOCK)
            grad_P = tl.load(grad + at_P, mask=at_P < parameters, other=0.0).to(tl.float32)
            sum_P += grad_P * grad_P
    tl.store(sums + tl.program_id(0), tl.sum(sum_P, 0))


# ----------------------------------------------------------------------------------------------------- operators

_BLOCK = 2048
_BLOCKS = 4


@triton_op("duotone::squared_norm", mutates_args={})
def _launch(grad_P: Tensor) -> Tensor:
    programs = -(-grad_P.numel() // (_BLOCK * _BLOCKS))
    sums = torch.empty(programs, dtype=torch.float32, device=grad_P.device)
    arguments = {"grad": grad_P, "sums": sums, "parameters": grad_P.numel(), "BLOCK": _BLOCK, "BLOCKS": _BLOCKS}
    launch(NAME, wrap_triton(_kernel), (programs,), arguments | {"num_warps": 8})
    return sums.sum(dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- public


def squared_norm(grad_P):
    """The sum of squares of a flat tensor: 0-dimensional, fp64, on its device.

    It is not finite if an element is not. The kernel squares and adds in fp32 within a program: elements above 1e17 in
    size may overflow, and those below 1e-22 count as 0. Raises ValueError if the tensor is not flat, contiguous and floating-point.
    """
    require(grad_P.dim() == 1, "grad_P", "flat", tuple(grad_P.shape))
    require(grad_P.numel() < 2 or grad_P.stride(0) == 1, "grad_P", "contiguous", f"stride {grad_P.stride()}")
    require(grad_P.is_floating_point(), "grad_P", "of a floating-point type", grad_P.dtype)
    if runs_kernel(NAME, grad_P):
        reason = _unsupported(grad_P)
        if reason is None:
            return _launch(grad_P)
        count_fallback(NAME, reason, *grad_P.shape)
    return squared_norm_reference(grad_P)


def _unsupported(grad_P):
    """The reason why the kernel cannot take this call, or None."""
    if grad_P.numel() == 0:
        return "an empty shard"
    known = grad_P.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return None if known else f"{grad_P.dtype} gradients"
