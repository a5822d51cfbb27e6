"""Every random number of a run is a function of (seed, position, purpose); position counts images since its start.

So a run resumes from one integer, and draws do not depend on ranks, workers or micro-batch. Salmon et al. 2011 (Philox).
"""

import math
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from duotone.data.batch import Plan
from duotone.data.order import samples_at
from duotone.kernels.philox import normal_reference, uniform_reference


class Purpose(IntEnum):
    """What a number is drawn for; a purpose never changes its value, so that old runs can be replayed."""

    NOISE = 0
    SIGMA = 1
    FLIP = 2
    CROP = 3
    CAPTION = 4
    DROP = 5
    SAMPLE_START = 6
    SAMPLE_STEP = 7
    JOINT_DROP = 8
    ATTRIBUTE_DROP = 9
    HOLE = 10
    TEMPERATURE = 11
    DROPOUT = 12


BLOCK = 4096
"""Positions drawn at once and cached: drawn step by step, they would take longer than a step of a small network."""


def uniform(seed: int, positions_N: np.ndarray, purpose: Purpose, count: int = 1) -> Tensor:
    """`count` numbers in (0, 1) for each position, (N, count) float64."""
    positions_N = np.asarray(positions_N, dtype=np.int64)
    first = positions_N[0] // BLOCK if len(positions_N) else 0
    places_N = positions_N - first * BLOCK
    if not len(positions_N) or places_N.min() < 0 or places_N.max() >= BLOCK:
        return uniform_reference(seed, torch.from_numpy(positions_N), int(purpose), count)
    return _block(seed, int(first), int(purpose), count)[torch.from_numpy(places_N)]


@lru_cache(maxsize=32)
def _block(seed: int, block: int, purpose: int, count: int) -> Tensor:
    return uniform_reference(seed, torch.arange(block * BLOCK, (block + 1) * BLOCK), purpose, count)


def stratified(u_N: Tensor, positions_N: np.ndarray, batch: int) -> Tensor:
    """u_N spread evenly over the global batch: each image draws within its own stratum, 1 / batch wide.

    Neighbouring positions get distant strata, so micro-batches see all noise levels. Kingma et al. 2021, appendix I.1.
    """
    stride = max(1, round(batch * 0.618034))
    while math.gcd(stride, batch) > 1:
        stride += 1
    stratum_N = torch.as_tensor(positions_N % batch) * stride % batch
    return (stratum_N + u_N) / batch


def normal(
    seed: int, positions_N: np.ndarray, purpose: Purpose, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """`count` standard normal numbers for each position, (N, count) fp32; every device makes the same ones."""
    return normal_reference(seed, torch.as_tensor(positions_N, dtype=torch.int64).to(device), int(purpose), count)


def seed_dropout(seed: int, positions_N: np.ndarray) -> None:
    """Seeds torch's generators, from which dropout inside the network draws, by the first position of a micro-batch.

    So a resumed run draws as if it had not stopped; unlike all other draws, these depend on how a batch is divided.
    """
    torch.manual_seed(int(uniform(seed, positions_N[:1], Purpose.DROPOUT).item() * 2**53))


def plan(seed: int, positions_N: np.ndarray, samples: int) -> Plan:
    """Which of the `samples` samples are read at these positions, and how: its crop and its caption."""
    return Plan(
        positions_N=positions_N,
        samples_N=samples_at(seed, positions_N, samples),
        crops_N2=uniform(seed, positions_N, Purpose.CROP, 2).numpy(),
        captions_N=uniform(seed, positions_N, Purpose.CAPTION)[:, 0].numpy(),
    )


def micro_batches(first: int, batch: int, micro: int, rank: int, ranks: int) -> list[np.ndarray]:
    """Positions of one rank's micro-batches in the step that begins at image `first`: by rank, then by micro-batch."""
    per_rank = batch // ranks
    mine = first + rank * per_rank + np.arange(per_rank, dtype=np.int64)
    return list(mine.reshape(-1, micro))
