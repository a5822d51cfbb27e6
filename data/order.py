"""Which sample is at which position of a run: one exact shuffle per epoch, computed from (seed, epoch) alone."""

from functools import lru_cache

import numpy as np

WORD = 2**64


def samples_at(seed: int, positions_N: np.ndarray, count: int) -> np.ndarray:
    """The sample at each position, int64 (N,); `count` samples make an epoch and each epoch holds every sample once.

    Raises ValueError for a negative position or an empty data set.
    """
    positions_N = np.asarray(positions_N, dtype=np.int64)
    if count < 1 or (positions_N.size and positions_N.min() < 0):
        raise ValueError(f"positions start at 0 and a data set has at least one sample, got count={count}")
    epochs_N, places_N = np.divmod(positions_N, count)
    samples_N = np.empty_like(positions_N)
    for epoch in np.unique(epochs_N):
        here_N = epochs_N == epoch
        samples_N[here_N] = _shuffle(seed, int(epoch), count)[places_N[here_N]]
    return samples_N


@lru_cache(maxsize=4)
def _shuffle(seed: int, epoch: int, count: int) -> np.ndarray:
    # numpy guarantees a bit generator's stream but not Generator.permutation's: hence a stable sort of raw words.
    words_N = np.random.Philox(key=np.array([seed % WORD, epoch], dtype=np.uint64)).random_raw(count)
    shuffle_N = np.argsort(words_N, kind="stable").astype(np.int64)
    shuffle_N.flags.writeable = False
    return shuffle_N
