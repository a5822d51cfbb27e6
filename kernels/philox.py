"""Philox 4x32-10: four 32-bit words as a pure function of a 64-bit seed and a 128-bit counter, alike on all devices.

The house's counter is (block of four draws, low word of the position, high word of the position, purpose), so every
number of a run is f(seed, position, purpose). Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
N positions, B blocks of four words.
"""

import math

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# ---------------------------------------------------------------------------------------------------- definition


def philox_reference(seed, c0, c1, c2, c3):
    """Four int64 tensors of words in [0, 2^32) for counters (c0, c1, c2, c3); bit-identical to Triton's `tl.philox`."""
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) & _WORD for c in (c0, c1, c2, c3)))
    for _ in range(_ROUNDS):
        # An int64 product wraps, and its bits are those of the unsigned one: shift and mask give both halves.
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (odd >> 32 & _WORD) ^ c1 ^ key0
        c2 = (even >> 32 & _WORD) ^ c3 ^ key1
        c1, c3 = odd & _WORD, even & _WORD
        key0, key1 = key0 + _KEY_STEPS[0] & _WORD, key1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def words_reference(seed, positions_N, purpose, blocks):
    """Words (N, B, 4) of the house's counter: block b of the draws that `purpose` makes at each position."""
    positions_N = torch.as_tensor(positions_N, dtype=torch.int64)
    block_B = torch.arange(blocks, dtype=torch.int64, device=positions_N.device)
    position_N1 = positions_N[:, None]
    purpose = torch.full((), purpose, dtype=torch.int64, device=positions_N.device)
    return torch.stack(philox_reference(seed, block_B, position_N1 & _WORD, position_N1 >> 32, purpose), dim=-1)


def uniform_reference(seed, positions_N, purpose, count):
    """(N, count) float64 in the open interval (0, 1): u = (word + 1/2) / 2^32, exact."""
    words_NB4 = words_reference(seed, positions_N, purpose, -(-count // 4))
    return ((words_NB4.to(torch.float64) + 0.5) / 2**32).flatten(1)[:, :count]


def normal_reference(seed, positions_N, purpose, count):
    """(N, count) fp32 standard normals by Box and Muller 1958: words (0, 1) give two, words (2, 3) give two."""
    words_NB4 = words_reference(seed, positions_N, purpose, -(-count // 4))
    radius_NB2 = torch.sqrt(-2 * torch.log(_unit(words_NB4[..., 0::2])))
    angle_NB2 = 2 * math.pi * _unit(words_NB4[..., 1::2])
    pair_NB22 = torch.stack((radius_NB2 * torch.cos(angle_NB2), radius_NB2 * torch.sin(angle_NB2)), dim=-1)
    return pair_NB22.flatten(1)[:, :count]


def _unit(word):
    return (word.to(torch.float32) + 0.5) * 2.0**-32
