"""Counts what a network does: operator calls, the bytes they read and write, changes of layout, graphs, kernel launches.

Counts do not depend on the machine's load. `ghost_counts` counts a network of any size without memory, time or a device:
it runs on tensors without storage, and calls the kernels that a GPU would run instead of their PyTorch definitions.
"""

import contextlib
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch
from networks import condition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duotone.engine.fuse import fuse
from duotone.kernels import attention_backends


@dataclass
class Counts:
    """Calls of operators that move data (views move none), and the bytes of their tensors, read plus written."""

    operators: int = 0
    bytes: int = 0
    layout_changes: int = 0
    """Copies whose result holds the same values in another order in memory."""
    layout_bytes: int = 0
    by_operator: Counter = field(default_factory=Counter)


class Counting(TorchDispatchMode):
    """Counts every operator call made within it, including the backward pass's, into `counts`."""

    def __init__(self):
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if moves_data(function, inputs, outputs):
            self.note(function, inputs, outputs)
        return result

    def note(self, function, inputs: list, outputs: list) -> None:
        moved = sum(t.nbytes for t in inputs + outputs)
        self.counts.operators += 1
        self.counts.bytes += moved
        self.counts.by_operator[function.overloadpacket.__name__] += 1
        if changes_layout(function, inputs, outputs):
            self.counts.layout_changes += 1
            self.counts.layout_bytes += moved


def tensors(tree) -> list:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def moves_data(function, inputs: list, outputs: list) -> bool:
    """False for views, for allocations, and for queries about a tensor."""
    if not outputs or function.namespace == "prim" or "empty" in function.overloadpacket.__name__:
        return False
    if function._schema.is_mutable:
        return True
    held = {t.untyped_storage()._cdata for t in inputs}
    return any(t.untyped_storage()._cdata not in held for t in outputs)


def changes_layout(function, inputs: list, outputs: list) -> bool:
    if function.overloadpacket.__name__ not in ("clone", "copy_", "_to_copy", "contiguous"):
        return False
    source = inputs[1] if function.overloadpacket.__name__ == "copy_" and len(inputs) > 1 else inputs[0]
    return source.dim() > 2 and order(source) != order(outputs[0])


def order(tensor) -> list[int]:
    """Axes from the slowest to the fastest in memory, without those of length 1."""
    axes = [axis for axis in range(tensor.dim()) if tensor.shape[axis] > 1]
    return sorted(axes, key=lambda axis: -tensor.stride(axis))


def forward(unet, batch: dict):
    """The prediction; on a GPU in bf16, as in the timed step."""
    with precision(batch):
        return unet(batch["x"], batch["t"], **batch["condition"]).sample


def precision(batch: dict):
    on_gpu = batch["x"].is_cuda
    return torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16, enabled=on_gpu)


def forward_backward(unet, batch: dict) -> None:
    forward(unet, batch).float().square().mean().backward()
    unet.zero_grad(set_to_none=True)


def counts_of(unet, batch: dict) -> Counts:
    """One forward and backward pass."""
    with Counting() as counting:
        forward_backward(unet, batch)
    return counting.counts


# ------------------------------------------------------------------------------------------ without storage or device


def ghost_counts(unet, size: int, batch: int) -> dict[str, dict]:
    """Counts before and after fuse(), in bf16, as on a GPU: our kernels are one call each; cuDNN's copies do not show."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found = {}
    with FakeTensorMode(), in_bf16():
        ghost = type(unet).from_config(unet.config)
        feed = ghost_batch(unet.config, size, batch)
        found["before fuse"] = summary(counts_of(ghost, feed), batch)
        fuse(ghost, quiet=True)
        with kernels_standing_in():
            found["after fuse"] = summary(counts_of(ghost, feed), batch)
    return found


def summary(counts: Counts, batch: int) -> dict:
    return {
        "operators": counts.operators,
        "megabytes_per_image": round(counts.bytes / batch / 1e6, 2),
        "layout_changes": counts.layout_changes,
        "layout_megabytes_per_image": round(counts.layout_bytes / batch / 1e6, 2),
    }


@contextlib.contextmanager
def in_bf16():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def ghost_batch(config, size: int, batch: int) -> dict:
    named = {name: value.to(torch.get_default_dtype()) if value.is_floating_point() else value
             for name, value in condition(config, batch, None).items()}  # fmt: skip
    x_NCHW = torch.empty(batch, config.in_channels, size, size)
    return {"x": x_NCHW, "t": torch.zeros(batch, dtype=torch.long), "condition": named}


def kernels_standing_in():
    """Runs our operators as on a GPU, or by their PyTorch definitions if Triton is not installed."""
    stack = contextlib.ExitStack()
    # On a CPU, long attention runs in fp32; to count a GPU's, PyTorch's operator runs in the input's dtype.
    stack.enter_context(mock.patch.object(attention_backends, "on_a_cpu", attention_backends.scaled_dot_product))
    with contextlib.suppress(ImportError):
        from harness import recorded

        stack.enter_context(recorded())
    return stack


# -------------------------------------------------------------------------------------------------- graphs, launches


def graphs(unet, batch: dict) -> dict[str, int]:
    """How many pieces torch.compile cuts the forward pass into; it is only traced, not compiled."""
    torch._dynamo.reset()
    with torch.no_grad(), precision(batch):
        explained = torch._dynamo.explain(unet)(batch["x"], batch["t"], **batch["condition"])
    torch._dynamo.reset()
    return {"graphs": explained.graph_count, "graph_breaks": explained.graph_break_count}


GROUPS = {
    "convolution": ("conv",),
    "norm": ("group_norm", "layer_norm"),
    "attention": ("attention", "attn", "sdp"),
    "optimizer": ("adam", "Optimizer.step", "lerp", "foreach"),
    "linear": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
}


def group_of(operator: str) -> str:
    """The part of a step that an operator belongs to."""
    for group, marks in GROUPS.items():
        if any(mark in operator for mark in marks):
            return group
    return "other"


def profiled(step, device: str, repeats: int = 5) -> dict:
    """Shares of a step's time by part, each part's median of a few steps, and the kernels launched on a GPU."""
    profiles = [profile_of(step, device) for _ in range(repeats)]
    times = [times_by_group(profile, device) for profile in profiles]
    medians = {group: statistics.median(one[group] for one in times) for group in (*GROUPS, "other")}
    total = sum(medians.values()) or 1
    shares = {group: round(value / total, 4) for group, value in medians.items()}
    return {"shares": shares} | ({"kernel_launches": kernel_launches(profiles[-1])} if device == "cuda" else {})


def profile_of(step, device: str):
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    return profile


def times_by_group(profile, device: str) -> Counter:
    """Microseconds of each part's operators, without those they call; on a GPU, of the kernels they launched."""
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times: Counter = Counter()
    for row in profile.key_averages():
        if row.device_type == torch.autograd.DeviceType.CPU:
            times[group_of(row.key)] += getattr(row, own)
    return times


def kernel_launches(profile) -> int:
    """Kernels that ran on the device; copies and fills by the driver are not counted."""
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def saved_bytes(unet, passed: Callable) -> int:
    """Bytes that autograd keeps between a forward pass and its backward pass, not counting the weights."""
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    held: dict[int, tuple] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            held[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        passed()
    return sum(size for size, _ in held.values())
