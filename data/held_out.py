"""Which samples are held out of training: their keys alone decide, not their shard or what other samples there are."""

import hashlib
from dataclasses import replace
from typing import Literal

import numpy as np

from duotone.data.tar_index import TarIndex

Part = Literal["training", "held out", "all"]


def is_held_out(key: str, share: float) -> bool:
    """Whether the key's hash, as a number in [0, 1), is below the share."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) < share * 2**64


def part_of(index: TarIndex, share: float, part: Part) -> TarIndex:
    """The samples of a shard that belong to one part."""
    if part == "all" or (share == 0 and part == "training"):
        return index
    held_out_N = np.array([is_held_out(key, share) for key in index.keys], dtype=bool)
    return subset(index, held_out_N if part == "held out" else ~held_out_N, f"{share} {part}")


def subset(index: TarIndex, kept_N: np.ndarray, why: str) -> TarIndex:
    """The kept samples, renumbered; `why` goes into the fingerprint."""
    samples_M = np.flatnonzero(kept_N).tolist()
    return replace(
        index,
        keys=[index.keys[sample] for sample in samples_M],
        columns={name: column[kept_N] for name, column in index.columns.items()},
        bad={place: index.bad[sample] for place, sample in enumerate(samples_M) if sample in index.bad},
        fingerprint=hashlib.sha256(f"{index.fingerprint} {why}".encode()).hexdigest(),
    )
