"""One launch for work of two passes: the second pass over a slab runs while the level-2 cache still holds the first's reads.

A slab is cut into chunks, and every chunk is worked on twice, by two programs. Programs take turns from a counter, in the
order in which they begin: the first passes run `ahead` slabs before the second ones. A program of the second pass waits
for first passes alone, all of which took an earlier turn and wait for nothing. So however few programs a GPU holds at
once, and whatever else runs beside them, each wait ends; nothing has to be resident together (compare the ticket of
Merrill and Garland 2016, decoupled look-back).

`turns` is int32 and 0 before the launch: the counter, then for every slab how many of its first passes have ended.
"""

from duotone.kernels.dispatch import tl, triton


@triton.jit
def take_turn(turns, slabs, chunks, ahead):
    """What this program works on: whether it is the second pass, the slab, the chunk; 1 <= ahead <= slabs.

    `ahead` slabs of first passes alone, then first and second passes alternately, then second passes alone.
    """
    turn = tl.atomic_add(turns, 1, sem="relaxed")
    head = ahead * chunks
    paired = (slabs - ahead) * chunks
    after = turn - head
    is_tail = after >= 2 * paired
    is_second = (turn >= head) & (is_tail | (after % 2 == 1))
    first = tl.where(turn < head, turn, head + after // 2)
    second = tl.where(is_tail, after - paired, after // 2)
    work = tl.where(is_second, second, first)
    return is_second, work // chunks, work % chunks


@triton.jit
def end_first_pass(turns, slab):
    """Make this program's stores visible and return how many of the slab's first passes had ended before."""
    tl.debug_barrier()  # the count is one thread's: every other's stores come before it
    return tl.atomic_add(turns + 1 + slab, 1, sem="acq_rel")


@triton.jit
def publish(turns, slab):
    """The last first pass has stored what the slab's second passes read."""
    tl.debug_barrier()
    tl.atomic_add(turns + 1 + slab, 1, sem="release")


@triton.jit
def wait_for_first_passes(turns, slab, chunks):
    """Return when the slab's first passes have ended and their result is published."""
    while tl.atomic_add(turns + 1 + slab, 0, sem="acquire") <= chunks:
        pass
    tl.debug_barrier()
