"""Which conditions of a training batch are replaced by their null condition: each independently, or all of an image together.

N images.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from duotone.data.batch import Batch, to_device
from duotone.engine import draws
from duotone.engine.conditioning.base import Conditioner


def conditioned(
    conditioners: Mapping[str, Conditioner], batch: Batch, seed: int, flip_N: Tensor, together: float
) -> tuple[dict, dict]:
    """Each conditioner's tensors, and its keep_N: False with the conditioner's dropout, and where all are dropped together.

    Ho and Salimans 2022, algorithm 1, line 3. Guidance's null branch drops all conditions at once; it is trained by doing
    the same with probability `together`.
    """
    if any(c.spatial for c in conditioners.values()):
        batch = replace(batch, images_NHWC=mirrored(batch.images_NHWC, flip_N))
    u_NK = draws.uniform(seed, batch.positions_N, draws.Purpose.DROP, max(1, len(conditioners)))
    whole_N = draws.uniform(seed, batch.positions_N, draws.Purpose.JOINT_DROP)[:, 0] >= together
    tensors = {kind: c.of_batch(batch, seed) for kind, c in conditioners.items()}
    keep = {kind: (u_NK[:, i] >= c.dropout) & whole_N for i, (kind, c) in enumerate(conditioners.items())}
    return tensors, keep


def mirrored(images_NHWC: Tensor, flip_N: Tensor) -> Tensor:
    """The images as the network sees them."""
    flip_N = to_device(flip_N, images_NHWC.device)
    return torch.where(flip_N[:, None, None, None], images_NHWC.flip(2), images_NHWC)
