"""What decides whether a call runs a Triton kernel or its reference, and what the run's record says about it.

This is the only place that knows Triton may be absent: kernel files take `triton` and `tl` from here, and where there
is no Triton (macOS) the decorators leave inert objects behind and every call goes to its reference.
"""

import contextlib
import os
from collections import Counter

import torch


class _Absent:
    """Stands for the missing package while kernel files are imported: any attribute, any call, never launched."""

    def __getattr__(self, name):
        return self

    def __call__(self, *arguments, **options):
        return self


try:
    import triton
    import triton.language as tl
    from torch.library import triton_op, wrap_triton

    HAS_TRITON = True
except ImportError:
    triton = tl = triton_op = wrap_triton = _Absent()
    HAS_TRITON = False

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from duotone.kernels.interpreted import redefine_once_a_launch

    redefine_once_a_launch()

    # Nothing looks through an interpreted launch, and torch 2.11 refuses to wrap one.
    def wrap_triton(kernel):
        return kernel


launches: Counter = Counter()
_fallbacks: dict[str, dict[tuple, str]] = {}
_disabled: dict[str, str] = {}
_imagining = False


@contextlib.contextmanager
def imagined():
    """Calls on tensors without storage take the kernels' path, and nothing is launched: what a GPU would hold."""
    global _imagining
    _imagining = True
    try:
        yield
    finally:
        _imagining = False


def launch(name: str, wrapped, grid: tuple[int, ...], arguments: dict) -> None:
    """Launch a kernel and count it; a compiled graph counts when it is traced.

    The operator itself calls wrap_triton: torch.compile reads operators' sources to know when a kernel has changed.
    """
    if _imagining:
        return
    launches[name] += 1
    with on_their_device(arguments):
        wrapped[grid](**arguments)


def launch_exactly(name: str, kernel, grid: tuple[int, ...], arguments: dict) -> None:
    """Launch with every product and sum rounded by itself, as a CPU does; not visible to torch.compile."""
    launches[name] += 1
    with on_their_device(arguments):
        direct(kernel)[grid](**arguments, enable_fp_fusion=False)


def on_their_device(arguments: dict):
    """Triton launches on the current device, whichever the tensors are on."""
    if not torch.cuda.is_initialized():
        return contextlib.nullcontext()
    return torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, torch.Tensor)))


def direct(kernel):
    """The kernel itself, where nothing has to see through the launch: what bench/harness.py replaces, as it does `wrap_triton`."""
    return kernel


def runs_kernel(kernel: str, tensor: torch.Tensor) -> bool:
    """True where a Triton kernel can be launched on this tensor's device and its self-test has not disabled it."""
    if tensor.is_meta:
        return _imagining and kernel not in _disabled
    if kernel in _disabled:
        return False
    return INTERPRETED if tensor.device.type == "cpu" else HAS_TRITON and tensor.device.type == "cuda"


def reaches_far(tensor: torch.Tensor) -> bool:
    """Whether entries of one image lie farther apart than a kernel's 32 bits address: a view of a larger tensor may."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:])) >= 2**31


def count_fallback(kernel: str, reason: str, *shape: int) -> None:
    """Note that `kernel` went to its reference for this reason, once per shape (in a compiled graph, once)."""
    if _imagining:
        return
    if torch.compiler.is_compiling():
        _note(kernel, reason)
    else:
        _note(kernel, reason, *shape)


@torch.compiler.assume_constant_result
def _note(kernel, reason, *shape):
    _fallbacks.setdefault(kernel, {})[(reason, *shape)] = reason


def fallbacks() -> list[dict]:
    """What the run's record shows: one row per kernel, reason and shape that went to a reference."""
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
    """Kernels that a self-test switched off, with the reason."""
    return dict(_disabled)


def refuse(argument: str, must: str, got) -> None:
    """Raise the one form of message that input which cannot fit gets."""
    raise ValueError(f"{argument} must be {must}, got {got}")


def require(condition: bool, argument: str, must: str, got) -> None:
    """Refuse unless the condition holds."""
    if not condition:
        refuse(argument, must, got)


def require_same_device(argument: str, tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Refuse a tensor that lives on another device than the first argument."""
    require(tensor.device == other.device, argument, f"on {other.device}", tensor.device)
