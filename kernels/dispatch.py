"""Decides whether a call runs a Triton kernel or its reference, and records which calls fell back.

This is the only place that knows Triton may be absent: kernel files import `triton` and `tl` from here. Without Triton
(macOS) the decorators leave inert objects behind and every call goes to its reference.
"""

import contextlib
import os
from collections import Counter

import torch


class _Absent:
    """A placeholder for the missing package while kernel files are imported: it takes any attribute and any call."""

    def __getattr__(self, name):
        return self

    def __call__(self, *arguments, **options):
        return self


try:
    import triton
    import triton.language as tl
    from torch.library import wrap_triton

    HAS_TRITON = True
except ImportError:
    triton = tl = wrap_triton = _Absent()
    HAS_TRITON = False

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from duotone.kernels.interpreted import redefine_once_a_launch

    redefine_once_a_launch()

    # torch.compile cannot trace an interpreted launch anyway, and torch 2.11 refuses to wrap one.
    def wrap_triton(kernel):
        return kernel


def triton_op(name: str, *, mutates_args):
    """torch.library.triton_op, through which torch.compile sees the launches in an operator's body.

    That loads the compiler, which takes seconds. A build of PyTorch without CUDA launches nothing and calls operators only
    on meta tensors, so a plain operator does there.
    """
    if not HAS_TRITON:
        return lambda function: _Absent()
    if INTERPRETED or torch.backends.cuda.is_built():
        return torch.library.triton_op(name, mutates_args=mutates_args)
    return lambda function: _plain_op(name, function, mutates_args)


def _plain_op(name, function, mutates_args):
    operator = torch.library.custom_op(name, function, mutates_args=mutates_args)
    operator.register_fake(function)
    return operator


def constant_in_graphs(function):
    """torch.compiler.assume_constant_result, without loading the compiler to set one attribute."""
    function._dynamo_marked_constant = True
    return function


launches: Counter = Counter()
_fallbacks: dict[str, dict[tuple, str]] = {}
_disabled: dict[str, str] = {}
_imagining = False


@contextlib.contextmanager
def on_meta_tensors():
    """Calls on meta tensors take the kernels' path without a launch, which shows what a GPU would keep in memory."""
    global _imagining
    _imagining = True
    try:
        yield
    finally:
        _imagining = False


def launch(name: str, wrapped, grid: tuple[int, ...], arguments: dict) -> None:
    """Launch a kernel and count the launch; in a compiled graph it counts once, when the graph is traced.

    wrap_triton is called in the operator, not here: torch.compile reads operators' sources to see if a kernel changed.
    """
    if _imagining:
        return
    launches[name] += 1
    with on_their_device(arguments):
        wrapped[grid](**arguments)


def launch_exactly(name: str, kernel, grid: tuple[int, ...], arguments: dict) -> None:
    """Launch with every product and sum rounded separately, as on a CPU; torch.compile cannot trace such a launch."""
    launches[name] += 1
    with on_their_device(arguments):
        unwrapped(kernel)[grid](**arguments, enable_fp_fusion=False)


def on_their_device(arguments: dict):
    """Make the tensors' device current: Triton launches on the current device, wherever the tensors are."""
    if not torch.cuda.is_initialized():
        return contextlib.nullcontext()
    return torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, torch.Tensor)))


def unwrapped(kernel):
    """The kernel itself, for launches that are not traced; bench/harness.py replaces this, as it does `wrap_triton`."""
    return kernel


def runs_kernel(kernel: str, tensor: torch.Tensor) -> bool:
    """Whether the Triton kernel can be launched on this tensor's device and its self-test has not disabled it."""
    if tensor.is_meta:
        return _imagining and kernel not in _disabled
    if kernel in _disabled:
        return False
    return INTERPRETED if tensor.device.type == "cpu" else HAS_TRITON and tensor.device.type == "cuda"


def exceeds_32_bit_offsets(tensor: torch.Tensor) -> bool:
    """Whether entries of one image are too far apart for 32-bit offsets, as may happen in a view of a larger tensor."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:])) >= 2**31


def count_fallback(kernel: str, reason: str, *shape: int) -> None:
    """Record that `kernel` fell back to its reference for this reason, once per shape (once in a compiled graph)."""
    if _imagining:
        return
    if torch.compiler.is_compiling():
        _note(kernel, reason)
    else:
        _note(kernel, reason, *shape)


@constant_in_graphs
def _note(kernel, reason, *shape):
    _fallbacks.setdefault(kernel, {})[(reason, *shape)] = reason


def fallbacks() -> list[dict]:
    """The run's record of fallbacks: one row per kernel, reason and shape."""
    return [
        {"kernel": kernel, "reason": reason, "shape": list(shape)}
        for kernel, seen in _fallbacks.items()
        for reason, *shape in seen
    ]


def disable(kernel: str, reason: str) -> None:
    """Send every further call of `kernel` to its reference; the record shows the reason."""
    _disabled[kernel] = reason
    count_fallback(kernel, reason)


def disabled() -> dict[str, str]:
    """The kernels that a self-test switched off, each with the reason."""
    return dict(_disabled)


def refuse(argument: str, must: str, got) -> None:
    """Raise ValueError in the form that every invalid argument gets."""
    raise ValueError(f"{argument} must be {must}, got {got}")


def require(condition: bool, argument: str, must: str, got) -> None:
    """Raise ValueError unless the condition is true."""
    if not condition:
        refuse(argument, must, got)


def require_same_device(argument: str, tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Raise ValueError if the tensor is not on the first argument's device, that of `other`."""
    require(tensor.device == other.device, argument, f"on {other.device}", tensor.device)
