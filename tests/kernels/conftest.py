"""Kernel tests run on a GPU, or on a CPU through Triton's interpreter; never through the reference by accident."""

import os
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch

from duotone.kernels import dispatch

HOW = 'tests/kernels need the interpreter or a GPU: TRITON_INTERPRET=1 pytest tests/kernels -m "not gpu and not long"'
# In the environment, so that every worker of a run has the same.
SEED = int(os.environ.setdefault("KERNEL_TEST_SEED", str(time.time_ns() % 10**6)))
# The interpreter truncates fp32 to bf16, where a GPU rounds to the nearest.
UNIT_ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7 if dispatch.INTERPRETED else 2.0**-8,
}


def pytest_report_header():
    return f"kernel tests draw fresh inputs: KERNEL_TEST_SEED={SEED} repeats these"


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(pytest_report_header())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Without a way to run a kernel, pytest ends in an error; on a GPU, `-m gpu` also selects tests that use `device`."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and not (dispatch.INTERPRETED or torch.cuda.is_available()):
        raise pytest.UsageError(HOW)
    for item in here if not dispatch.INTERPRETED else ():
        if "device" in item.fixturenames and not item.get_closest_marker("long"):
            item.add_marker("gpu")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail('this test is marked gpu and there is none: deselect it with -m "not gpu"')


@pytest.fixture
def device():
    return "cpu" if dispatch.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poisoned_and_fresh(request):
    """Fills uninitialised memory with NaN, which shows elements that a kernel forgets to write; inputs differ per test."""
    torch.manual_seed(SEED + zlib.crc32(request.node.name.encode()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_writer_within_bounds(monkeypatch):
    """Every address is stored once per launch: the interpreter runs programs in order, which would hide a race.

    And every access lies within one of the launch's tensors: outside, it would go unnoticed, or crash the process.
    """
    if not dispatch.INTERPRETED:
        return
    from triton.runtime import interpreter

    builder, run = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    written, extents = [], []

    def note(pointers, mask):
        addresses = pointers.data[mask.data]
        low, high = (addresses.min(), addresses.max()) if addresses.size else (0, 0)
        if not addresses.size or any(first <= low and high < end for first, end in extents):
            return addresses  # nearly always: an access lies within one tensor
        inside = numpy.zeros(addresses.shape, bool)
        for first, end in extents:
            inside |= (first <= addresses) & (addresses < end)
            if inside.all():
                return addresses
        assert not extents, "a kernel reads or writes outside of its tensors"
        return addresses  # started by a test's own executor, whose tensors are not known here

    def noting_load(self, pointers, mask, *rest):
        note(pointers, mask)
        return load(self, pointers, mask, *rest)

    def noting_store(self, pointers, value, mask, *rest):
        written.append(note(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def checked_run(self, *arguments, **options):
        written.clear()
        extents[:] = [extent(t) for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)]
        run(self, *arguments, **options)
        addresses = numpy.concatenate([*written, numpy.empty(0, int)])
        twice = addresses.size - numpy.unique(addresses).size
        assert not twice, f"{self.fn.__name__} stores {twice} elements twice"

    monkeypatch.setattr(builder, "create_masked_load", noting_load)
    monkeypatch.setattr(builder, "create_masked_store", noting_store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked_run)


def extent(tensor) -> tuple[int, int]:
    """The first address of a tensor, and the one after its last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@pytest.fixture
def launching():
    """A context that must launch the named kernel and must not fall back to its reference."""

    @contextmanager
    def block(kernel, launches=None):
        before, fallbacks = dispatch.launches[kernel], len(dispatch.fallbacks())
        yield
        risen = dispatch.launches[kernel] - before
        assert risen > 0, f"{kernel}: no Triton kernel was launched"
        assert launches is None or risen == launches, f"{kernel}: {risen} launches instead of {launches}"
        assert len(dispatch.fallbacks()) == fallbacks, dispatch.fallbacks()

    return block


@pytest.fixture
def agree():
    """Compares with fp64; allows one rounding to the result's dtype, and fp32 arithmetic relative to the largest value."""

    def check(got, exact, what, arithmetic=1e-5, scale=None):
        assert got.shape == exact.shape, f"{what}: {tuple(got.shape)} instead of {tuple(exact.shape)}"
        assert got.isfinite().all(), f"{what} is not finite"
        error = (got.double() - exact).abs()
        scale = exact.abs().amax() if scale is None else scale
        allowed = UNIT_ROUNDOFF[got.dtype] * exact.abs() + arithmetic * scale.clamp(min=1e-30)
        assert (error <= allowed).all(), f"{what}: off by {(error / allowed).max():.3g} times what is allowed"

    return check
