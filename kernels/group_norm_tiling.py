"""Cuts a group_norm_silu call into programs by its shape alone, so the same call always sums in the same order."""

import math
from dataclasses import dataclass

_LINE_BYTES = 128
_HALF_LINE_BYTES = 64
WHOLE_ELEMENTS = 16384
WHOLE_ELEMENTS_MODULATED_BACKWARD = 8192  # twice that spills on sm_90: a row per modulation is live
_TILE = 4096
_MOST_CHUNKS = 64
_LEAST_ROWS = 512
# In turns, chunks are small: the cache must hold what all running programs work on, and half of them are first passes.
_MOST_CHUNKS_IN_TURNS = 128
_LEAST_ROWS_IN_TURNS = 128
_TILE_IN_TURNS = 2048  # one wide load per thread: at twice that, half as many programs of the modulated gradient fit
_CHUNKS_AHEAD = 512
_KEPT_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Tiling:
    """How one call is cut into programs; `chunks` is 0 where a program holds a whole slab."""

    span: int  # channels of a program, always whole groups
    block_c: int
    block_g: int
    block_r: int  # rows in a tile
    rows: int  # rows of a program
    chunks: int
    warps: int


def tiling(
    channels: int, groups: int, pixels: int, itemsize: int, room: int = WHOLE_ELEMENTS, in_turns: bool = False
) -> Tiling:
    """Cut a call into programs; `room` is how many elements one program can hold on chip."""
    # Reading half cache lines pays only if it avoids a second read of everything.
    for line_bytes in (_LINE_BYTES, _HALF_LINE_BYTES):
        span = _channel_span(channels, groups, line_bytes // itemsize)
        whole_r, block_c = power_of_2(pixels), power_of_2(span)
        if whole_r * block_c <= room:
            block_g = _block_g(span, channels // groups)
            return Tiling(span, block_c, block_g, whole_r, pixels, 0, _warps(whole_r * block_c))
    span = _channel_span(channels, groups, _LINE_BYTES // itemsize)
    block_c = power_of_2(span)
    block_r = max(1, (_TILE_IN_TURNS if in_turns else _TILE) // block_c)
    least, most = (_LEAST_ROWS_IN_TURNS, _MOST_CHUNKS_IN_TURNS) if in_turns else (_LEAST_ROWS, _MOST_CHUNKS)
    rows = max(least, math.ceil(pixels / most))
    rows = math.ceil(rows / block_r) * block_r
    block_g = _block_g(span, channels // groups)
    return Tiling(span, block_c, block_g, block_r, rows, math.ceil(pixels / rows), _warps(2 * _TILE))


def fits_the_cache(cut: Tiling, pixels: int, itemsize: int) -> bool:
    """Whether a slab is still in the L2 cache when its second pass begins; from 512 px up it is not."""
    return pixels * cut.span * itemsize <= _KEPT_BYTES


def slabs_ahead(cut: Tiling, slabs: int, pixels: int, itemsize: int) -> int:
    """How many slabs first passes run ahead: enough that second passes rarely wait, few enough for the cache."""
    kept = _KEPT_BYTES // (pixels * cut.span * itemsize)
    return max(1, min(slabs, kept, math.ceil(_CHUNKS_AHEAD / cut.chunks)))


def _channel_span(channels, groups, least):
    """Channels per program: whole groups in equal shares, if possible at least `least`, with the fewest idle lanes."""
    per_group = channels // groups
    shares = [k * per_group for k in range(1, groups + 1) if groups % k == 0]
    wide = [span for span in shares if span >= least] or shares[-1:]
    return min(wide, key=lambda span: (power_of_2(span) / span, span))


def _block_g(span, per_group):
    is_even = per_group & (per_group - 1) == 0
    return power_of_2(span) // per_group if is_even else power_of_2(span // per_group)


def power_of_2(number):
    return 1 << (number - 1).bit_length()


def _warps(elements):
    return min(16, max(4, elements // 1024))
