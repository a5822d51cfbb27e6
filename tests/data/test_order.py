"""The order of samples: every epoch an exact shuffle, and a function of (seed, position) alone that never changes."""

import numpy as np
import pytest

from duotone.data.order import samples_at

FROZEN = [[0, 2, 9, 1, 8, 5, 4, 3, 6, 7], [7, 2, 6, 0, 5, 3, 8, 1, 4, 9]]


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_every_epoch_holds_every_sample_once(count):
    for epoch in range(3):
        samples_N = samples_at(5, epoch * count + np.arange(count), count)
        assert sorted(samples_N.tolist()) == list(range(count))


def test_position_alone_decides():
    whole_N = samples_at(3, np.arange(500), 70)
    shuffled_N = np.random.default_rng(0).permutation(500)
    assert (samples_at(3, shuffled_N, 70) == whole_N[shuffled_N]).all()
    assert (
        np.concatenate([samples_at(3, np.arange(start, start + 25), 70) for start in range(0, 500, 25)]) == whole_N
    ).all()


def test_epochs_and_seeds_differ():
    orders = {
        tuple(samples_at(seed, epoch * 50 + np.arange(50), 50)) for seed in (0, 1, -1, 2**40) for epoch in range(5)
    }
    assert len(orders) == 20


def test_order_is_frozen():
    """A run of an older version must see the same samples after a resume, so these numbers never change."""
    assert samples_at(0, np.arange(10), 10).tolist() == FROZEN[0]
    assert samples_at(1234, np.arange(20, 30), 10).tolist() == FROZEN[1]


def test_first_places_are_uniform():
    firsts_N = np.array([samples_at(seed, np.array([0]), 8)[0] for seed in range(4000)])
    counts_8 = np.bincount(firsts_N, minlength=8)
    assert ((counts_8 - 500) ** 2 / 500).sum() < 24.3  # chi-squared, 7 degrees of freedom, p = 0.001


@pytest.mark.parametrize("positions, count", [([-1], 5), ([0], 0)])
def test_nonsense_raises(positions, count):
    with pytest.raises(ValueError):
        samples_at(0, np.array(positions), count)
