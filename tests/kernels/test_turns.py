"""One launch in turns: the order of work, and group norms whose programs really wait for one another."""

import functools
import inspect
import random
import sys
import threading
import time

import pytest
import torch

from duotone.kernels import dispatch, group_norm_silu, group_norm_tiling
from duotone.kernels.dispatch import tl, triton
from duotone.kernels.turns import take_turn

# --------------------------------------------------------------------------------------------------------- the order


@triton.jit
def _note_turn(turns, seen, slabs, chunks, ahead):
    turn = tl.load(turns)
    is_second, slab, chunk = take_turn(turns, slabs, chunks, ahead)
    tl.store(seen + 3 * turn, is_second.to(tl.int32))
    tl.store(seen + 3 * turn + 1, slab)
    tl.store(seen + 3 * turn + 2, chunk)


@pytest.mark.parametrize("slabs,chunks,ahead", [(1, 1, 1), (1, 5, 1), (4, 3, 1), (5, 4, 2), (6, 2, 6), (7, 1, 3)])
def test_every_chunk_has_two_passes_and_each_waits_for_earlier_turns_alone(slabs, chunks, ahead):
    if not dispatch.INTERPRETED:
        pytest.skip("reads the counter without taking a turn, which is sound only one program at a time")
    turns, seen = torch.zeros(1, dtype=torch.int32), torch.full((2 * slabs * chunks, 3), -1, dtype=torch.int32)
    _note_turn[(2 * slabs * chunks,)](turns, seen, slabs, chunks, ahead)
    work = [tuple(row) for row in seen.tolist()]
    assert sorted(work) == [(p, s, c) for p in (0, 1) for s in range(slabs) for c in range(chunks)]
    last_first_pass = {s: max(t for t, (p, slab, _) in enumerate(work) if (p, slab) == (0, s)) for s in range(slabs)}
    assert all(turn > last_first_pass[slab] for turn, (is_second, slab, _) in enumerate(work) if is_second)
    firsts = [slab for is_second, slab, _ in work if not is_second]
    assert firsts == sorted(firsts)


def test_slabs_ahead_stay_within_the_cache():
    """The reference network's largest maps: 64 images, 128 channels, at 128 and 64 px: 2 MiB and half a MiB per slab."""
    for side, expected in ((128, 4), (64, 16)):
        cut = group_norm_tiling.tiling(128, 32, side**2, 2, in_turns=True)
        assert cut.span == 64 and group_norm_tiling.fits_the_cache(cut, side**2, 2)
        assert group_norm_tiling.slabs_ahead(cut, 128, side**2, 2) == expected
        assert expected * side**2 * cut.span * 2 <= 8 * 2**20
    assert not group_norm_tiling.fits_the_cache(cut, 512**2, 2)


# --------------------------------------------------------------------------------------------------------- the waits


@pytest.fixture(params=[2, pytest.param(7, marks=pytest.mark.long)], ids="{}_at_once".format)
def side_by_side(request, monkeypatch):
    """Runs a launch's programs as threads, a few at once; no slab is published before another program waits for it.

    Yields the slabs published in this way. In addition, programs are delayed at random when they update a counter.
    """
    from triton.runtime import interpreter

    call, patch, atomic = (
        interpreter.GridExecutor.__call__,
        interpreter._patch_lang,
        interpreter.InterpreterBuilder.create_atomic_rmw,
    )
    waited_for, published = set(), []

    def slow_atomic(self, operation, pointer, value, mask, order, scope):
        slab = int(pointer.data.item())
        if order == interpreter._ir.MEM_SEMANTIC.RELEASE:
            hold_until(lambda: slab in waited_for)
            published.append(slab)
        time.sleep(0.2 if random.random() < 0.1 else 0)  # much longer than a program takes, so that others overtake
        count = atomic(self, operation, pointer, value, mask, order, scope)
        if not value.data.any():
            waited_for.add(slab)
        return count

    def threaded(self, *arguments, **options):
        waited_for.clear()  # a launch's counters may have the addresses of the last launch's
        programs = Programs(self.fn, request.param)
        monkeypatch.setattr(self, "fn", programs.begin)
        call(self, *arguments, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_atomic_rmw", slow_atomic)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", threaded)
    monkeypatch.setattr(interpreter, "_patch_lang", lambda f: patch(getattr(f, "__wrapped__", f)))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield published
    sys.setswitchinterval(interval)


def hold_until(condition):
    """Returns once another program has made the condition true."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "no program waits for this one, so nothing would be shown"
        time.sleep(1e-3)


class Programs:
    """Runs the programs of one launch in threads, at most `at_once` at a time, and returns when the last has ended."""

    def __init__(self, kernel, at_once):
        self.seats, self.threads, self.errors = threading.Semaphore(at_once), [], []
        self.begin = functools.wraps(kernel)(lambda **arguments: self._begin(kernel, arguments))
        self.begin.__signature__ = inspect.signature(kernel)

    def _begin(self, kernel, arguments):
        from triton.runtime.interpreter import interpreter_builder

        assert self.seats.acquire(timeout=60), "no program has ended for a minute: they wait for one another"
        self.threads.append(threading.Thread(target=self._run, args=(kernel, arguments), daemon=True))
        self.threads[-1].start()
        if len(self.threads) == interpreter_builder.grid_dim[0]:
            for thread in self.threads:
                thread.join(timeout=60)
                assert not thread.is_alive(), "a program waits for one that never ends"
            assert not self.errors, self.errors

    def _run(self, kernel, arguments):
        try:
            kernel(**arguments)
        except Exception as error:
            self.errors.append(error)
        finally:
            self.seats.release()


def norm_and_gradients(function, x_NCHW, modulation, dy_NCHW):
    """Output and every gradient; weight and bias are 1 and 0."""
    weights = [torch.full((x_NCHW.shape[1],), value, dtype=modulation[0].dtype) for value in (1.0, 0.0)]
    leaves = [t.detach().requires_grad_() for t in (x_NCHW, *weights, *modulation)]
    y_NCHW = function(*leaves[:3], 8, add_NC=leaves[3], scale_NC=leaves[4], shift_NC=leaves[5])
    return [y_NCHW.detach(), *torch.autograd.grad(y_NCHW, leaves, dy_NCHW.to(y_NCHW.dtype))]


def test_programs_side_by_side_give_the_same_bits(side_by_side, monkeypatch):
    """Two images, each one slab of ten chunks; first passes are only one slab ahead, so that some must wait."""
    if not dispatch.INTERPRETED:
        pytest.skip("a GPU runs programs side by side anyway: test_on_gpu.py")
    monkeypatch.setattr(group_norm_tiling, "_CHUNKS_AHEAD", 1)
    in_turns = functools.partial(group_norm_silu.group_norm_silu, in_turns=True)
    x_NCHW, dy_NCHW = (torch.randn(2, 32, 40, 32).contiguous(memory_format=torch.channels_last) for _ in range(2))
    modulation = torch.randn(2, 96).chunk(3, dim=1)
    first, second = (norm_and_gradients(in_turns, x_NCHW, modulation, dy_NCHW) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second))
    wide = [x_NCHW.double(), [value.double() for value in modulation], dy_NCHW]
    exact = norm_and_gradients(group_norm_silu.group_norm_silu_reference, *wide)
    for mine, right in zip(first, exact):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5 * right.abs().max().item())
    assert group_norm_tiling.tiling(32, 8, 40 * 32, 4, in_turns=True).chunks == 10
    launches, slabs = 2 * 2, 2
    assert len(side_by_side) == launches * slabs
