"""How much memory a rank will need, from the network itself: nothing is allocated."""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import nn

from duotone.kernels.dispatch import imagined


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank."""

    state: int
    """Weights, gradients, fp32 master weights, moments and EMA, as sharded."""
    activations: int
    """What autograd keeps of one micro-batch."""

    @property
    def gib(self) -> float:
        return (self.state + self.activations) / 2**30


def estimate(network: nn.Module, recipe, micro: int, choice, ranks: int) -> Estimate:
    """The prediction for a micro-batch of `micro` images."""
    parameters = sum(p.numel() for p in network.parameters())
    held = parameters * choice.dtype.itemsize
    sharded = 4 * 4 * parameters // ranks
    gradients = parameters * 4 // (ranks if recipe.zero.stage > 1 else 1)
    weights = held // (ranks if recipe.zero.stage == 3 else 1)
    return Estimate(weights + gradients + sharded, micro * saved_per_image(network.unet, recipe.data.size, choice))


def saved_per_image(unet: nn.Module, size: int, choice) -> int:
    """Bytes that autograd keeps for one image, counted on a copy without storage; on CUDA the kernels keep less."""
    held = getattr(unet, "checkpointing", False)
    ghost = copy.deepcopy(unet).to("meta", choice.dtype)
    ghost.checkpointing = held
    # Views share their storage: a transposed weight is a weight, and what two layers keep is held once.
    weights = {p.untyped_storage()._cdata for p in ghost.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    config = unet.config
    x = torch.empty(1, config.in_channels + config.extra_channels, size, size, device="meta", dtype=choice.dtype)
    tokens = torch.empty(1, 77, config.context_width, device="meta", dtype=choice.dtype)
    path = imagined() if choice.device == "cuda" else contextlib.nullcontext()
    with path, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ghost(x, torch.zeros(1, device="meta"), None, tokens if "cross" in (*config.attention, config.middle) else None)
    return sum(storage.nbytes() for storage in kept.values())


def flops_per_image(unet: nn.Module, size: int) -> int:
    """Arithmetic of one forward pass for one image, multiplications and additions, counted on a copy without storage."""
    from torch.utils.flop_counter import FlopCounterMode

    ghost, config = copy.deepcopy(unet).to("meta", torch.float32), unet.config
    x = torch.empty(1, config.in_channels + config.extra_channels, size, size, device="meta")
    tokens = torch.empty(1, 77, config.context_width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(x, torch.zeros(1, device="meta"), None, tokens if "cross" in (*config.attention, config.middle) else None)
    return counter.get_total_flops()
