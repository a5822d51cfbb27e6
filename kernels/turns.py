"""Two passes in one launch: the second pass over a slab runs while the L2 cache still holds what the first one read.

A slab is cut into chunks, and two programs work on each chunk, one per pass. Programs take turns from a counter in the
order in which they start; first passes run `ahead` slabs before second passes. A second-pass program waits only for
first passes, all of which took an earlier turn and themselves wait for nothing. So every wait ends, however few
programs a GPU runs at once and whatever else runs beside them: no set of programs has to be resident together (compare
the ticket of Merrill and Garland 2016, decoupled look-back).

`turns` is int32 and 0 before the launch: the counter, then for each slab how many of its first passes have ended,
plus 1 once their result is published.
"""

from duotone.kernels.dispatch import tl, triton


@triton.jit
def take_turn(turns, slabs, chunks, ahead):
    """What this program works on: (whether it is a second pass, slab, chunk); 1 <= ahead <= slabs.

    Turns begin with `ahead` slabs of first passes, then first and second passes alternate, then second passes remain.
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
    tl.debug_barrier()  # one thread counts: every other thread's stores must come first
    return tl.atomic_add(turns + 1 + slab, 1, sem="acq_rel")


@triton.jit
def publish(turns, slab):
    """Called by the slab's last first pass, once it has stored what the second passes read."""
    tl.debug_barrier()
    tl.atomic_add(turns + 1 + slab, 1, sem="release")


@triton.jit
def wait_for_first_passes(turns, slab, chunks):
    """Return once the slab's first passes have ended and their result is published."""
    while tl.atomic_add(turns + 1 + slab, 0, sem="acquire") <= chunks:
        pass
    tl.debug_barrier()
