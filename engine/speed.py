"""Every performance switch in one place: device, precision, compilation, TF32, cuDNN, gradient checkpointing."""

import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from duotone.data.refusal import Refused
from duotone.engine.model.blocks import Attention, GroupNormSiLU, ResBlock, SelfAttention, Transformer
from duotone.kernels.dispatch import runs_kernel


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Switches that change how fast a run goes, and at most the rounding of its numbers."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on CUDA (fp16 on cards without it), fp32 on the CPU, where bf16 is slower."""
    compile: bool | None = None
    """torch.compile of every repeated block; by default on CUDA only, since on a CPU it takes minutes."""
    backend: str = "inductor"
    """Backend of torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: about a third more work for much less memory."""
    threads: int | None = None
    """CPU threads of each rank; by default the cores divided among the ranks of this machine."""


@dataclass(frozen=True)
class Choice:
    """The switches as they stand on this machine."""

    device: str
    precision: str
    compile: bool

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


def choose(speed: Speed) -> Choice:
    """Resolves every `auto`; refuses a device that is not here."""
    cuda = torch.cuda.is_available()
    if speed.device == "cuda" and not cuda:
        raise Refused("speed.device = cuda, but torch finds no CUDA device: leave it at auto to train on the CPU")
    device = "cuda" if cuda and speed.device != "cpu" else "cpu"
    precision = speed.precision
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    compiled = device == "cuda" if speed.compile is None else speed.compile
    return Choice(device, precision, compiled)


def set_up(speed: Speed, choice: Choice) -> None:
    """The process-wide switches."""
    if choice.device == "cpu":
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
        torch.set_num_threads(speed.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    # Shapes never change within a run, so trying every algorithm once pays.
    torch.backends.cudnn.benchmark = True


def compile_blocks(network: nn.Module, backend: str = "inductor") -> int:
    """Compiles each residual block and attention in place, fullgraph; blocks of one shape share the compiled code."""
    # One block class meets every width and resolution of the network: each is one specialisation.
    torch._dynamo.config.recompile_limit = 256
    blocks = [m for m in network.modules() if isinstance(m, ResBlock | SelfAttention | Transformer)]
    for block in blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    return len(blocks)


def substitutions(choice: Choice) -> list[str]:
    """One line for each part of this machine's set-up that is not the fast one."""
    if choice.device == "cpu":
        return ["no CUDA device: the CPU runs the kernels' plain PyTorch definitions"]
    return []


def kernel_sites(network: nn.Module, device: torch.device) -> tuple[int, int]:
    """How many group norms and attentions of the network run our kernels on this device, and how many there are."""
    kernels = {GroupNormSiLU: "group_norm_silu", Attention: "attention"}
    names = [name for module in network.modules() for kind, name in kernels.items() if isinstance(module, kind)]
    probe = torch.empty(0, device=device)
    return sum(runs_kernel(name, probe) for name in names), len(names)


def compiled_graphs() -> int:
    """Graphs compiled so far: growth after the second step means that something recompiles."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())
