"""What every measurement here shares: launches as they would happen, what the compiler makes of them, and clocks.

Nothing in this file knows a kernel by name. A launch is recorded by letting the operator run on tensors without storage
and noting what it would have launched; the same arguments are then compiled for real chips without one being present.
"""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from duotone.kernels import dispatch

CHIPS = {80: "A100", 89: "L40S, RTX 4090", 90: "H100, H200", 100: "B200", 120: "RTX 5090"}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch as the operator asked for it."""

    kernel: object
    grid: tuple[int, ...]
    arguments: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_")


@contextmanager
def recorded():
    """Collect launches instead of making them."""
    seen: list[Launch] = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **arguments: seen.append(Launch(self.kernel, grid, arguments))

    with mock.patch.multiple(dispatch, wrap_triton=Recorder, direct=Recorder):
        yield seen


@dataclass(frozen=True)
class Resources:
    """What a program occupies on a chip."""

    registers: int  # per thread
    spilled_bytes: int  # stack and local memory per thread
    shared_bytes: int  # per program
    warps: int
    widest_load_bits: int
    widest_store_bits: int

    def resident_programs(self, registers=65536, shared_bytes=227 * 1024, warps=64) -> int:
        """Programs that one multiprocessor holds at once; the defaults are those of H100."""
        by_registers = registers // max(1, self.registers * 32 * self.warps)
        by_shared = shared_bytes // max(1, self.shared_bytes + 1024)
        return min(by_registers, by_shared, warps // self.warps, 32)


def resources(launch: Launch, chip: int) -> Resources:
    """Compile one recorded launch for compute capability `chip` / 10 and read what the assembler reports."""
    source, options = _source(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Resources(
        registers=found["REG"],
        spilled_bytes=found["STACK"] + found["LOCAL"],
        shared_bytes=max(found["SHARED"], compiled.metadata.shared),
        warps=compiled.metadata.num_warps,
        widest_load_bits=_widest(r"LDG\.E(\S*)", sass),
        widest_store_bits=_widest(r"STG\.E(\S*)", sass),
    )


def _source(launch):
    names = launch.kernel.arg_names
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = launch.arguments[name]
        if name in constants or value is None or (type(value) is int and value == 1):
            signature[name], constexprs[(index,)] = "constexpr", value
        else:
            signature[name] = _type(value)
            if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: launch.arguments[name] for name in _OPTIONS if name in launch.arguments}
    return ASTSource(launch.kernel, signature, constexprs, attributes), options


def _type(value):
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _tool(name, *arguments):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _widest(pattern, sass):
    widths = [re.search(r"\.(64|128)\b", suffix) for suffix in re.findall(pattern, sass)]
    return max((int(width.group(1)) if width else 32 for width in widths), default=0)
