"""Two training steps tried for real, before a run settles on its micro-batch.

The estimate (engine/memory.py) counts what autograd keeps; workspaces and gaps between tensors show only in a run.
"""

from dataclasses import replace

import torch

from duotone.engine import speed
from duotone.engine.memory import Estimate, imagined_inputs
from duotone.engine.model.unet import UNet


def fits(unet: UNet, size: int, rows: int, needed: Estimate, switches: speed.Speed, choice: speed.Choice) -> bool:
    """Whether two steps of `rows` images run on the device of `unet`, in a twin of it, beside the optimizer's state."""
    device = unet.conv_in.weight.device
    try:
        # Random numbers are left as they were: a run that tries goes on as one that does not.
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
    # Uncompiled: that holds more than what is compiled, and does not keep the run waiting.
    speed.make_ready(twin, switches, replace(choice, compile=False))
    weights = sum(p.nbytes for p in twin.parameters())
    # The twin brings weights and gradients of its own; the rest of the state is held free for the run.
    state = torch.empty(max(0, needed.state - 2 * weights), dtype=torch.uint8, device=device)
    inputs = [
        None if one is None else torch.zeros(rows, *one.shape[1:], dtype=one.dtype, device=device)
        for one in imagined_inputs(config, size, choice.dtype)
    ]
    for _ in range(2):
        twin(*inputs).float().square().mean().backward()
    del state  # held until here
    return True
