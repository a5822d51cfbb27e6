"""Philox 4x32-10: four 32-bit words as a pure function of a 64-bit seed and a 128-bit counter, the same on all devices.

Duotone's counter is (block of four draws, low word of the position, high word of the position, purpose), so every
number of a run is f(seed, position, purpose). Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
N positions, B blocks of four words.
"""

import math

import torch

from duotone.kernels.dispatch import tl, triton

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
        # An int64 product wraps to the same bits as the unsigned product: shift and mask extract both halves.
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (odd >> 32 & _WORD) ^ c1 ^ key0
        c2 = (even >> 32 & _WORD) ^ c3 ^ key1
        c1, c3 = odd & _WORD, even & _WORD
        key0, key1 = key0 + _KEY_STEPS[0] & _WORD, key1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def words_reference(seed, positions_N, purpose, blocks):
    """Words (N, B, 4) of Duotone's counter: block b of the draws that `purpose` makes at each position."""
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
    """(N, count) fp32 standard normals by Box and Muller 1958: words (0, 1) give two, words (2, 3) another two.

    Every operation used is correctly rounded under IEEE 754, so all devices give the same bits.
    """
    words_NB4 = words_reference(seed, positions_N, purpose, -(-count // 4))
    radius_NB2 = _radius_reference(words_NB4[..., 0::2])
    cosine_NB2, sine_NB2 = _direction_reference(words_NB4[..., 1::2])
    pair_NB22 = torch.stack((radius_NB2 * cosine_NB2, radius_NB2 * sine_NB2), dim=-1)
    return pair_NB22.flatten(1)[:, :count]


# Taylor series at the origin; over the ranges below, the first omitted term is under 3e-8 of the result.
_LOG = (1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0)  # atanh(s) / s in s^2, |s| < 0.172
_SIN = (1 / 362880, -1 / 5040, 1 / 120, -1 / 6, 1.0)  # sin(y) / y in y^2, |y| <= pi / 4
_COS = (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0)
_LOG_2 = math.log(2)
_SQRT_2 = math.sqrt(2)
_QUARTER_STEP = math.pi / 2**31  # radians per step of a word within its quarter turn


def _radius_reference(word):
    """sqrt(-2 ln u), u = (word + 1/2) / 2^32, with ln(2^e m) = e ln 2 + 2 atanh((m - 1) / (m + 1))."""
    bits = ((word.to(torch.float32) + 0.5) * 2.0**-32).view(torch.int32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    is_high = mantissa > _SQRT_2
    mantissa = torch.where(is_high, mantissa * 0.5, mantissa)
    exponent = ((bits >> 23) - 127 + is_high).to(torch.float32)
    s = (mantissa - 1) / (mantissa + 1)
    logarithm = exponent * _LOG_2 + s * 2 * _polynomial_reference(s * s, _LOG)
    # On a CPU, torch's fp32 root is not always rounded to nearest; an fp64 root rounded to fp32 is (Figueroa 1995).
    return torch.sqrt((logarithm * -2).double()).float()


def _direction_reference(word):
    """Cosine and sine of 2 pi u, u = (word + 1/2) / 2^32, expanded around the nearest quarter turn."""
    quarter = word + 2**29 >> 30
    y = ((word - (quarter << 30)).to(torch.float32) + 0.5) * _QUARTER_STEP
    sine, cosine = y * _polynomial_reference(y * y, _SIN), _polynomial_reference(y * y, _COS)
    is_odd, is_far = (quarter & 1).bool(), (quarter & 2).bool()
    turned_cosine, turned_sine = torch.where(is_odd, -sine, cosine), torch.where(is_odd, cosine, sine)
    return torch.where(is_far, -turned_cosine, turned_cosine), torch.where(is_far, -turned_sine, turned_sine)


def _polynomial_reference(z, coefficients):
    total = z * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * z + coefficient
    return total


# --------------------------------------------------------------------------------------------------- device code
# The functions above, line by line; kernels that call them must be launched without fused multiply-adds.

_LOG_9, _LOG_7, _LOG_5, _LOG_3, _ = (tl.constexpr(c) for c in _LOG)
_SIN_9, _SIN_7, _SIN_5, _SIN_3, _ = (tl.constexpr(c) for c in _SIN)
_COS_10, _COS_8, _COS_6, _COS_4, _COS_2, _ = (tl.constexpr(c) for c in _COS)
_LN_2, _ROOT_2, _STEP = tl.constexpr(_LOG_2), tl.constexpr(_SQRT_2), tl.constexpr(_QUARTER_STEP)


@triton.jit
def _radius(word):
    bits = ((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    is_high = mantissa > _ROOT_2
    mantissa = tl.where(is_high, mantissa * 0.5, mantissa)
    exponent = ((bits >> 23) - 127 + is_high.to(tl.int32)).to(tl.float32)
    s = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    z = s * s
    series = (((z * _LOG_9 + _LOG_7) * z + _LOG_5) * z + _LOG_3) * z + 1.0
    return tl.sqrt_rn((exponent * _LN_2 + s * 2.0 * series) * -2.0)


@triton.jit
def _direction(word):
    quarter = (word >> 30) + ((word >> 29) & 1)
    y = ((word - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * _STEP
    z = y * y
    sine = y * ((((z * _SIN_9 + _SIN_7) * z + _SIN_5) * z + _SIN_3) * z + 1.0)
    cosine = ((((z * _COS_10 + _COS_8) * z + _COS_6) * z + _COS_4) * z + _COS_2) * z + 1.0
    is_odd = (quarter & 1) != 0
    is_far = (quarter & 2) != 0
    turned_cosine = tl.where(is_odd, -sine, cosine)
    turned_sine = tl.where(is_odd, cosine, sine)
    return tl.where(is_far, -turned_cosine, turned_cosine), tl.where(is_far, -turned_sine, turned_sine)


@triton.jit
def words(seed, block, position, purpose):
    """The four words of each block at one position, as uint32; `position` is an int64 scalar."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = block.to(tl.uint32) * 0
    return tl.philox(seed, block.to(tl.uint32), zero + low, zero + high, (zero + purpose).to(tl.uint32))


@triton.jit
def normals(seed, block, position, purpose):
    """The four standard normals of each block at one position, as fp32."""
    word0, word1, word2, word3 = words(seed, block, position, purpose)
    radius0, radius2 = _radius(word0), _radius(word2)
    cosine0, sine0 = _direction(word1)
    cosine2, sine2 = _direction(word3)
    return radius0 * cosine0, radius0 * sine0, radius2 * cosine2, radius2 * sine2
