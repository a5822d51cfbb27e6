"""How much memory a rank will need, computed from the network itself, and what fits into it."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from duotone.data.refusal import Refused
from duotone.engine.model.unet import UNet, UNetConfig
from duotone.kernels.dispatch import on_meta_tensors

MOST_ROWS = 64
USABLE = 0.85  # of a GPU: the rest goes to workspaces, to gaps between tensors and to the driver


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank."""

    state: int
    """Weights, gradients, fp32 master weights, moments and EMA, as sharded."""
    activations: int
    """What autograd keeps of one micro-batch."""

    @property
    def gib(self) -> float:
        return (self.state + self.activations) / 2**30


def estimate(network: nn.Module, recipe, micro: int, choice, ranks: int) -> Estimate:
    """Predicts the memory of one rank for a micro-batch of `micro` images."""
    parameters = sum(p.numel() for p in network.parameters())
    held = parameters * choice.dtype.itemsize
    sharded = 4 * recipe.optimizer.state_elements(network) // ranks
    gradients = parameters * 4 // (ranks if recipe.zero.stage > 1 else 1)
    weights = held // (ranks if recipe.zero.stage == 3 else 1)
    frozen = choice.dtype.itemsize * sum(p.numel() for module in network.frozen_modules for p in module.parameters())
    return Estimate(
        weights + frozen + gradients + sharded, micro * saved_per_image(network.unet, recipe.data.size, choice)
    )


def fewest_micro_batches(network: nn.Module, recipe, choice, ranks: int, room: int, least: int = 1) -> int:
    """Fewest micro-batches per rank and step, from `least` on, of which one fits into `room` bytes; Refused if none."""
    share = recipe.batch_size // ranks

    def fits(times: int) -> bool:
        needed = estimate(network, recipe, share // times, choice, ranks)
        return needed.state + needed.activations <= USABLE * room

    for times in range(least, share + 1):
        if share % times == 0 and fits(times):
            return times
    needed = estimate(network, recipe, 1, choice, ranks)
    raise Refused(
        f"one image at a time needs about {needed.gib:.1f} GiB per rank, but there are only {room / 2**30:.1f}: take "
        "--speed.gradient-checkpointing, a higher --zero.stage with more ranks, or a smaller network or --data.size"
    )


def saved_per_image(unet: nn.Module, size: int, choice) -> int:
    """Bytes that autograd keeps for one image, counted on a copy without storage; on CUDA the kernels keep less."""
    return saved_by(unet.config, size, choice.dtype, choice.device == "cuda", getattr(unet, "checkpointing", False))


@lru_cache
def saved_by(config: UNetConfig, size: int, dtype: torch.dtype, fused: bool, checkpointing: bool) -> int:
    with torch.device("meta"):
        twin = UNet(config).to(dtype)
    twin.checkpointing = checkpointing
    # By storage, which views share: a transposed weight is a weight, and what two layers keep counts once.
    weights = {p.untyped_storage()._cdata for p in twin.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with on_meta_tensors() if fused else nullcontext(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        twin(*imagined_inputs(config, size, dtype))
    return sum(storage.nbytes() for storage in kept.values())


def imagined_inputs(config: UNetConfig, size: int, dtype: torch.dtype) -> tuple:
    """One image, its time and 77 tokens, without storage."""
    with torch.device("meta"):
        x_NCHW = torch.empty(1, config.in_channels + config.extra_channels, size, size, dtype=dtype)
        tokens_NMD = torch.empty(1, 77, config.context_width, dtype=dtype)
        return x_NCHW, torch.zeros(1), None, tokens_NMD if config.reads_tokens else None


def rows_that_fit(unet: nn.Module, size: int) -> int:
    """Images to sample at once: as many as training could hold in half the free memory; sampling needs less."""
    device, dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_on_cpu()
    row = saved_by(unet.config, size, dtype, device.type == "cuda", False)
    return max(1, min(MOST_ROWS, int(0.5 * free) // row))


def in_chunks(compute: Callable[[slice], np.ndarray], number: int, at_once: int) -> np.ndarray:
    """Computes all rows, `at_once` at a time; if memory runs out, continues with half as many at a time."""
    parts, first = [], 0
    while first < number:
        rows = slice(first, min(first + at_once, number))
        try:
            parts.append(compute(rows))
        except torch.cuda.OutOfMemoryError:
            if at_once == 1:
                raise
            torch.cuda.empty_cache()
            at_once = -(-at_once // 2)
            continue
        first = rows.stop
    return np.concatenate(parts)


def free_on_cpu() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@lru_cache
def flops_of(config: UNetConfig, size: int) -> int:
    with torch.device("meta"):
        # Without gradients: the counter would hook those of weights that a block returns.
        twin = UNet(config).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(*imagined_inputs(config, size, torch.float32))
    return counter.get_total_flops()


def flops_per_image(unet: nn.Module, size: int) -> int:
    """Multiplications and additions of one forward pass for one image, counted on a copy without storage."""
    return flops_of(unet.config, size)
