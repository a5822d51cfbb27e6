"""Tries two real training steps before a run settles on its micro-batch.

The estimate (engine/memory.py) counts what autograd keeps; workspaces and gaps between tensors show only in a run.
"""

from dataclasses import replace

import torch

from duotone.engine import speed
from duotone.engine.memory import Estimate, imagined_inputs
from duotone.engine.model.unet import UNet


def fits(unet: UNet, size: int, rows: int, needed: Estimate, switches: speed.Speed, choice: speed.Choice) -> bool:
    """Whether two steps of `rows` images fit on the device of `unet`, in a copy of it, beside the optimizer's state."""
    device = unet.conv_in.weight.device
    try:
        # The random state is restored, so that a run that tries steps is the same as one that does not.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return runs(unet.config, size, rows, needed, switches, choice, device)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def runs(config, size: int, rows: int, needed: Estimate, switches, choice, device: torch.device) -> bool:
    with device:
        twin = UNet(config).to(choice.dtype)
    # Uncompiled, which needs more memory than compiled blocks and does not delay the run by compiling.
    speed.make_ready(twin, switches, replace(choice, compile=False))
    weights = sum(p.nbytes for p in twin.parameters())
    # The copy has its own weights and gradients; this reserves the memory of the rest of the state.
    state = torch.empty(max(0, needed.state - 2 * weights), dtype=torch.uint8, device=device)
    inputs = [
        None if one is None else torch.zeros(rows, *one.shape[1:], dtype=one.dtype, device=device)
        for one in imagined_inputs(config, size, choice.dtype)
    ]
    for _ in range(2):
        twin(*inputs).float().square().mean().backward()
    del state  # keeps the reservation until here
    return True
