"""Every performance switch in one place: device, precision, compilation, CUDA graphs, TF32, cuDNN, gradient checkpointing."""

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from duotone.data.refusal import Refused, at_least
from duotone.engine.model.blocks import Attention, GroupNormSiLU, ResBlock, SelfAttention, Transformer
from duotone.engine.model.unet import UNet
from duotone.kernels.dispatch import runs_kernel


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Switches that change how fast a run goes, and at most the rounding of its numbers."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA (fp16 on cards without it), fp32 on the CPU."""
    compile: bool | None = None
    """torch.compile of every repeated block; by default on CUDA below ZeRO-3, since on a CPU it takes minutes."""
    backend: str = "inductor"
    """Backend of torch.compile."""
    autotune: bool = False
    """Time cuDNN against the compiler's own templates for each convolution and matrix product: minutes, once."""
    cuda_graphs: bool = False
    """Replay recorded launches, on CUDA: those of each compiled block in training, of the whole network in sampling."""
    whole_step: bool = False
    """Record a whole step, update included, as one CUDA graph and replay it, on one GPU without accumulation; the first
    step checks the recording against an eager step, with two copies of the state in CPU memory."""
    padded_ends: bool = False
    """Pad the image's few channels to eight with zeros, as tensor cores need for the first and the last convolution."""
    norms_in_turns: bool = False
    """Normalise large feature maps in one launch, while the cache still holds what an image's statistics read."""
    norms_join_skips: bool = False
    """On the way up, let a block's first norm read x and its skip in place, write them concatenated, and add up their
    gradients; off until it has been measured on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: about a third more work for much less memory."""
    threads: int | None = None
    """CPU threads per rank; by default OMP_NUM_THREADS, or the cores divided among the ranks on this machine."""


SAMPLING = Speed(compile=False)
"""The default for sampling: compiling takes longer than drawing a few pictures."""


@dataclass(frozen=True)
class Choice:
    """What the switches resolve to on this machine."""

    device: str
    precision: str
    compile: bool

    def __str__(self) -> str:
        return f"{self.precision} on {self.device}{', compiled' if self.compile else ''}"

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


def choose(speed: Speed, stage: int = 1) -> Choice:
    """Resolves every `auto` for a run of this ZeRO stage; raises Refused on a device that is not here.

    Stage 3 gathers weights between a block's modules, so a block is not a single graph there and is not compiled.
    """
    cuda = torch.cuda.is_available()
    at_least("speed.threads", 1 if speed.threads is None else speed.threads, 1)
    if speed.device == "cuda" and not cuda:
        raise Refused("speed.device = cuda, but torch finds no CUDA device: leave it at auto to train on the CPU")
    device = "cuda" if cuda and speed.device != "cpu" else "cpu"
    precision = speed.precision
    if precision == "auto":
        precision = (
            "fp32" if device == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        )
    usual = device == "cuda" and stage < 3 and c_compiler() is not None
    compiled = usual if speed.compile is None else speed.compile
    if compiled and speed.backend == "inductor":
        refuse_without_compiler(device)
    elif compiled:
        refuse_unknown_backend(speed.backend)
    return Choice(device, precision, compiled)


def c_compiler() -> str | None:
    """The compiler with which Triton builds the launchers of its kernels, or None."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def refuse_unknown_backend(name: str) -> None:
    """Raises Refused on a name that torch.compile does not know."""
    from torch._dynamo.backends.registry import list_backends, lookup_backend
    from torch._dynamo.exc import InvalidBackend

    try:
        lookup_backend(name)
    except InvalidBackend:
        raise Refused(f"speed.backend = {name}: torch.compile knows {', '.join(list_backends())}") from None


def refuse_without_compiler(device: str) -> None:
    """Raises Refused if torch.compile could not build the code it generates."""
    if device == "cuda":
        if c_compiler() is None:
            raise Refused(
                "speed.compile = True needs a C compiler, for Triton's launchers, and finds none: "
                "install it (Debian: apt-get install gcc), or leave it off"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
        missing = None if Path(sysconfig.get_path("include"), "Python.h").exists() else "Python.h"
    except InvalidCxxCompiler:
        missing = "a C++ compiler"
    if missing:
        raise Refused(
            f"speed.compile = True needs {missing} on a CPU, and finds none: leave it off, or install it "
            "(Debian: apt-get install g++ python3-dev)"
        )


def set_up(speed: Speed, choice: Choice) -> None:
    """Sets the process-wide switches."""
    if choice.device == "cpu":
        torch.set_num_threads(speed.threads or usual_threads())
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    # Shapes never change within a run, so trying every algorithm once pays.
    torch.backends.cudnn.benchmark = True


def usual_threads() -> int:
    """The threads that OMP_NUM_THREADS asks for, or this rank's share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # a list gives nested parallel regions too
    # Set by torchrun, set by deepspeed, and a fallback if only the ranks of all machines are known.
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    local_ranks = int(next((os.environ[name] for name in names if name in os.environ), 1))
    cores = len(os.sched_getaffinity(0)) // local_ranks
    return max(1, int(asked) if asked.isdigit() else cores)


def compile_blocks(network: nn.Module, speed: Speed = Speed()) -> int:
    """Compiles each residual block and attention in place, fullgraph; blocks of one shape share the compiled code."""
    # A block class is specialised once for every width and resolution in the network.
    torch._dynamo.config.recompile_limit = 256
    blocks = [m for m in network.modules() if isinstance(m, ResBlock | SelfAttention | Transformer)]
    for block in blocks:
        block.compile(backend=speed.backend, fullgraph=True, dynamic=False, options=compiler_options(speed))
    return len(blocks)


def compiler_options(speed: Speed) -> dict[str, bool] | None:
    """The options that the switches set for Inductor; other backends get none."""
    if speed.backend != "inductor":
        return None
    return {"max_autotune": speed.autotune, "triton.cudagraphs": speed.cuda_graphs and not speed.whole_step}


def records_blocks(speed: Speed, choice: Choice) -> bool:
    """Whether Inductor records and replays each block as a CUDA graph in training."""
    graphs = choice.compile and (compiler_options(speed) or {}).get("triton.cudagraphs", False)
    return choice.device == "cuda" and graphs


def make_ready(unet: UNet, speed: Speed, choice: Choice) -> int:
    """Sets the switches that change the network itself, before it is used; returns how many blocks will be compiled."""
    unet.checkpointing = speed.gradient_checkpointing
    unet.pad_ends(speed.padded_ends)
    for norm in (m for m in unet.modules() if isinstance(m, GroupNormSiLU)):
        norm.in_turns, norm.joins_skips = speed.norms_in_turns, speed.norms_join_skips
    return compile_blocks(unet, speed) if choice.compile else 0


def why_not_whole_step(speed: Speed, choice: Choice, stage: int, ranks: int, accumulation: int) -> str | None:
    """Why whole steps are not recorded, or None: a replay would silently be wrong in each of these cases."""
    reasons = {
        "unless asked for": not speed.whole_step,
        "without a CUDA device": choice.device == "cpu",
        "with several ranks, which exchange gradients": ranks > 1,
        "with accumulation, whose steps differ": accumulation > 1,
        "at ZeRO-3, which gathers weights on the way": stage == 3,
        "in fp16, whose loss scale waits for every step": choice.precision == "fp16",
        "with gradient checkpointing, which stores the random generator's state": speed.gradient_checkpointing,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def substitutions(speed: Speed, choice: Choice) -> list[str]:
    """A line for each thing on this machine that is slower than it could be, or not what was asked for."""
    lines = []
    if choice.device == "cpu":
        lines.append("no CUDA device: the CPU runs the kernels' plain PyTorch definitions")
    if choice.device == "cuda" and c_compiler() is None:
        lines.append("no C compiler: nothing is compiled, and Triton's kernels run only if they were built before")
    elif choice.device == "cuda" and speed.compile is None and not choice.compile:
        lines.append("ZeRO-3 gathers weights within the blocks, which are therefore not compiled")
    if choice.device == "cuda" and speed.whole_step and speed.cuda_graphs:
        lines.append("speed.cuda_graphs has no effect with speed.whole_step, which records each step as one graph")
    if choice.device == "cpu" and speed.cuda_graphs:
        lines.append("speed.cuda_graphs has no effect without a CUDA device")
    if choice.device == "cpu" and speed.norms_in_turns:
        lines.append("speed.norms_in_turns has no effect without a CUDA device")
    if choice.device == "cpu" and speed.norms_join_skips:
        lines.append("speed.norms_join_skips has no effect without a CUDA device")
    if choice.device == "cuda" and speed.threads is not None:
        lines.append("speed.threads has no effect on a CUDA device")
    if not choice.compile or speed.backend != "inductor":
        needed = "speed.compile" if not choice.compile else "speed.backend = inductor"
        asked = {"autotune": speed.autotune, "cuda_graphs": speed.cuda_graphs and choice.device == "cuda"}
        lines += [f"speed.{name} has no effect in training without {needed}" for name, on in asked.items() if on]
    return lines


def kernel_sites(network: nn.Module, device: torch.device) -> tuple[int, int]:
    """How many group norms and attentions of the network run our kernels on this device, and how many it has."""
    kernels = {GroupNormSiLU: "group_norm_silu", Attention: "attention"}
    names = [name for module in network.modules() for kind, name in kernels.items() if isinstance(module, kind)]
    probe = torch.empty(0, device=device)
    return sum(runs_kernel(name, probe) for name in names), len(names)


def compiled_graphs() -> int:
    """Graphs compiled so far: growth after the second step means that something is recompiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())
