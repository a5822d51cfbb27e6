"""Records kernel launches without making them, compiles them for absent chips, and counts the bytes they request.

Nothing in this file knows a kernel by name. A launch is recorded by running the operator on tensors without storage and
noting what it would have launched; the kernel is then compiled for real chips with the same arguments.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# ------------------------------------------------------------------------------------------------------ recording


@dataclass(frozen=True)
class Launch:
    """One launch as the operator asked for it."""

    kernel: object
    grid: tuple[int, ...]
    arguments: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")


@contextlib.contextmanager
def recorded():
    """Collect the launches that calls on meta tensors would make."""
    seen: list[Launch] = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **arguments: seen.append(Launch(self.kernel, grid, arguments))

    with _launching_through(Recorder, runs_kernel=lambda *_: True):
        yield seen


@contextlib.contextmanager
def _launching_through(launcher, **replaced):
    """Every kernel file launches through `launcher(kernel)[grid](**arguments)`."""
    replaced |= {"wrap_triton": launcher, "unwrapped": launcher}
    with contextlib.ExitStack() as stack:
        for module in [m for name, m in sys.modules.items() if name.startswith("duotone.kernels.")]:
            present = {name: value for name, value in replaced.items() if hasattr(module, name)}
            if present:
                stack.enter_context(mock.patch.multiple(module, **present))
        yield


# ------------------------------------------------------------------------------------------------------ compiling


@dataclass(frozen=True)
class Chip:
    """What one multiprocessor holds, and the memory's peak bandwidth, from the vendor's data sheets."""

    name: str
    shared_bytes: int
    warps: int
    gigabytes_per_second: float


CHIPS = {
    80: Chip("A100 80 GB", 164 * 1024, 64, 2039),
    89: Chip("L40S", 100 * 1024, 48, 864),
    90: Chip("H100 SXM", 228 * 1024, 64, 3350),
    100: Chip("B200", 228 * 1024, 64, 8000),
    120: Chip("RTX 5090", 100 * 1024, 48, 1792),
}
_REGISTERS = 65536
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Resources:
    """What a program occupies on a chip, as the assembler reports it."""

    registers: int  # per thread
    spilled_bytes: int  # stack and local memory, per thread
    shared_bytes: int  # per program
    warps: int
    load_bits: int  # widest global load
    store_bits: int  # widest global store
    fused_multiply_adds: int  # in the assembly; 0 where a kernel asks for a CPU's rounding
    occupancy: float  # upper bound on the resident share of the warps that the chip can hold; 0 = it cannot be launched


def resources(launch: Launch, capability: int) -> Resources:
    """Compile one recorded launch for compute capability `capability` / 10."""
    source, options = _source(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    shared, warps = max(found["SHARED"], compiled.metadata.shared), compiled.metadata.num_warps
    return Resources(
        registers=found["REG"],
        spilled_bytes=found["STACK"] + found["LOCAL"],
        shared_bytes=shared,
        warps=warps,
        load_bits=_widest(r"LDG\.E(\S*)", sass),
        store_bits=_widest(r"STG\.E(\S*)", sass),
        fused_multiply_adds=compiled.asm["ptx"].count("fma.rn"),
        occupancy=_occupancy(CHIPS[capability], found["REG"], shared, warps),
    )


def fp64_arithmetic(launch: Launch, capability: int) -> list[str]:
    """fp64 instructions if numbers arrive in fp64, as torch.compile passes them; narrowing them does not count."""
    source, options = _source(launch, numbers="fp64")
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    words = [line.split() for line in ptx.splitlines() if ".f64" in line and not line.strip().startswith((".", "//"))]
    return [" ".join(line) for line in words if not line[0].startswith(("cvt.rn.f32.f64", "ld.param", "mov."))]


def compile_key(launch: Launch) -> tuple:
    """What distinguishes two launches for the compiler."""
    source, options = _source(launch)
    return launch.name, str(source.signature), str(source.constants), str(source.attrs), str(options)


def _source(launch, numbers="fp32"):
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    generic = {p.name for p in launch.kernel.params if p.do_not_specialize}
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        is_special = type(value) is int and name not in generic
        if name in constants or (is_special and value == 1):
            signature[name], constexprs[(index,)] = "constexpr", value
            continue
        signature[name] = numbers if isinstance(value, float) else _type(value)
        if isinstance(value, torch.Tensor) or (is_special and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: launch.arguments[name] for name in _OPTIONS if name in launch.arguments}
    return ASTSource(launch.kernel, signature, constexprs, attributes), options


def _type(value):
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _occupancy(chip, registers, shared_bytes, warps):
    programs = min(_REGISTERS // (registers * 32 * warps), chip.warps // warps, 32)
    # The system reserves 1 KiB of shared memory for each program.
    programs = min(programs, chip.shared_bytes // (shared_bytes + 1024))
    return programs * warps / chip.warps


def _tool(name, *arguments):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _widest(pattern, sass):
    widths = [re.search(r"\.(64|128)\b", suffix) for suffix in re.findall(pattern, sass)]
    return max((int(width.group(1)) if width else 32 for width in widths), default=0)


# --------------------------------------------------------------------------------------------------- counting bytes


@dataclass
class Traffic:
    """Bytes that one launch requested, and how many distinct ones they were: the least that memory must move."""

    kernel: str
    loaded: int = 0
    stored: int = 0
    distinct: int = 0


@contextlib.contextmanager
def counting_launches():
    """Collect the traffic of every interpreted launch from its own loads and stores."""
    from triton.runtime import interpreter

    launches: list[Traffic] = []
    touched: dict[str, list] = {"load": [], "store": []}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(kind, pointers, mask):
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        touched[kind].append((size, pointers.data[mask.data]))

    def counting_load(self, pointers, mask, *rest):
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    class Counter:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(**arguments):
                touched["load"], touched["store"] = [], []
                self.kernel[grid](**arguments)
                launches.append(_traffic(self.kernel.__name__.strip("_"), touched))

            return run

    with (
        mock.patch.multiple(builder, create_masked_load=counting_load, create_masked_store=counting_store),
        _launching_through(Counter),
    ):
        yield launches


def _traffic(name, touched):
    totals = {kind: sum(size * addresses.size for size, addresses in seen) for kind, seen in touched.items()}
    distinct = sum(_distinct(seen) for seen in touched.values())
    return Traffic(name, totals["load"], totals["store"], distinct)


PAGE = 2**20


def _distinct(seen) -> int:
    """Bytes at distinct addresses, marked page by page because a launch's tensors lie far apart."""
    import numpy

    pages = {}
    for size, addresses in seen:
        places, offsets = divmod(addresses.ravel(), PAGE)
        for page in range(int(places.min()), int(places.max()) + 1) if places.size else ():
            if (size, page) not in pages:
                pages[size, page] = numpy.zeros(PAGE, bool)
            pages[size, page][offsets[places == page]] = True
    return sum(size * int(marked.sum()) for (size, _), marked in pages.items())
