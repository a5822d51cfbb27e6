"""DeepSpeed ZeRO: joining the process group, setting up the engine, and communication between ranks.

The only file that imports deepspeed, and only inside functions, so that a bad configuration is refused before the slow import.
"""

import atexit
import gc
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from duotone.data.batch import to_device
from duotone.data.refusal import Refused
from duotone.engine.distributed.meeting import PATIENCE, clear_single_process_defaults, meet, single_process_defaults


@dataclass(frozen=True, kw_only=True)
class Zero:
    """How the training state is sharded over the ranks."""

    stage: Literal[1, 2, 3] = 1
    """1: shard optimizer state and EMA; 2: gradients too; 3: weights too."""
    bucket: int = 50_000_000
    """Elements reduced or gathered in one communication."""


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    count: int
    device: torch.device


def join(device: str) -> Ranks:
    """Joins the run's process group: the launcher's, or a group of one."""
    on_cuda = device == "cuda"
    if not on_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    single_process_defaults()
    import deepspeed

    quiet()
    if not on_cuda:
        without_its_own_operator()
    if not dist.is_initialized():
        before_there_is_a_group()
        backend = "nccl" if on_cuda else "gloo"
        meet(backend)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=PATIENCE)
        if not on_cuda:
            atexit.register(end_group)
    local = int(os.environ["LOCAL_RANK"])
    if on_cuda:
        torch.cuda.set_device(local)
    return Ranks(
        dist.get_rank(), dist.get_world_size(), torch.device("cuda", local) if on_cuda else torch.device("cpu")
    )


def before_there_is_a_group() -> None:
    """Imports functions whose default argument is the process group of that moment: imported later, as by the compiler, they
    would hold the group, and its threads, for good."""
    importlib.import_module("torch.distributed.nn.functional")


def without_its_own_operator() -> None:
    """Stops DeepSpeed from building its CPU inference operator at every start. Training never calls it, but building it needs a
    compiler, and it leaves 66 MiB per rank in /dev/shm for good."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def refuse_precision(precision: str) -> None:
    """Raises Refused for a precision in which DeepSpeed cannot train on this machine, such as fp16 on most CPUs."""
    from deepspeed.accelerator import get_accelerator

    here = {"fp16": get_accelerator().is_fp16_supported, "bf16": get_accelerator().is_bf16_supported}
    if precision in here and not here[precision]():
        raise Refused(
            f"speed.precision = {precision}: DeepSpeed does not train in {precision} on this machine's "
            f"{get_accelerator().device_name().upper()}: leave it at auto"
        )


def quiet() -> None:
    """Silences DeepSpeed, which logs every setting of every rank; the run's plan line says what matters."""
    for name in [name for name in logging.root.manager.loggerDict if name.lower().startswith("deepspeed")]:
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed calls functions that torch has deprecated; users can do nothing about that.
    warnings.filterwarnings("ignore", ".*is deprecated. Please use", FutureWarning, r"torch\.distributed\.c10d_logger")


def stage_taken(zero: Zero, precision: str, accumulation: int, recorded: bool = False) -> tuple[int, str | None]:
    """The stage that runs, and why, if it is not the one asked for; `recorded`: blocks are replayed as CUDA graphs.

    DeepSpeed's stage 1 passes bf16 with fp32 accumulation to another optimizer, which lets non-finite gradients into the
    weights; stage 2 accumulates in fp32 and skips such a step. In fp32, stage 1 leaves a micro-batch's gradients where the
    backward pass wrote them: in the memory of a CUDA graph, which the next micro-batch overwrites.
    """
    if zero.stage == 1 and accumulation > 1 and precision == "bf16":
        why = "adds up gradients in fp32 and skips non-finite ones"
    elif zero.stage == 1 and accumulation > 1 and precision == "fp32" and recorded:
        why = "adds up gradients outside the CUDA graphs"
    else:
        return zero.stage, None
    return 2, f"ZeRO-1 in {precision} with accumulation runs as ZeRO-2, which {why}"


def settings(
    zero: Zero, *, batch: int, micro: int, accumulation: int, precision: str, clip: float, recorded: bool = False
) -> dict:
    """DeepSpeed's own configuration."""
    stage, _ = stage_taken(zero, precision, accumulation, recorded)
    # A single micro-batch needs no accumulation, so the gradients keep their own type.
    accumulated_in = "bf16" if precision == "bf16" and accumulation == 1 and stage == 1 else "fp32"
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": precision == "fp16"},
        "data_types": {"grad_accum_dtype": accumulated_in},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        # DeepSpeed's timer waits for the device twice per micro-batch; ours does so only when a log line is due.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": zero.bucket,
            "allgather_bucket_size": zero.bucket,
            "stage3_param_persistence_threshold": 0,
        },
    }


def start(network: nn.Module, optimizer: Optimizer, config: dict):
    """DeepSpeed's engine around a network."""
    import deepspeed

    without_compiling_its_muon()
    return deepspeed.initialize(model=network, optimizer=optimizer, config=config)[0]


def without_compiling_its_muon() -> None:
    """Keeps DeepSpeed's Muon from loading the compiler. DeepSpeed imports its Muon in every run, only to compare types, and the
    torch.compile around its functions, which are never called, would add a second to every start."""
    importlib.import_module("torch._dynamo")  # imported first, since it reads the variable for good
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE") if before is None else os.environ.update(TORCHDYNAMO_DISABLE=before)


def count_step(engine) -> None:
    """Updates the counters of DeepSpeed's engine after a step of one micro-batch that bypassed the engine."""
    engine._global_grad_norm = engine.optimizer._global_grad_norm
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()


def gather_weights(partitioned) -> None:
    """Stages 1 and 2: sends every rank's part of the network's weights to all other ranks."""
    from deepspeed.runtime.utils import all_gather_dp_groups

    all_gather_dp_groups(
        groups_flat=partitioned.bit16_groups_flat,
        partitioned_param_groups=partitioned.parallel_partitioned_bit16_groups,
        dp_process_group=partitioned.real_dp_process_group,
        start_alignment_factor=partitioned.nccl_start_alignment_factor,
        allgather_bucket_size=partitioned.allgather_bucket_size,
    )


@contextmanager
def rank_0_first(ranks: Ranks):
    """Runs its block on rank 0 before the other ranks; if rank 0 raises Refused, all ranks raise it."""
    if ranks.rank:
        refusal = from_rank_0()
        if refusal is not None:
            raise refusal
    try:
        yield
    except Refused as refusal:
        if not ranks.rank:
            from_rank_0(refusal)
        raise
    if not ranks.rank:
        from_rank_0()


def from_rank_0(value=None):
    """Rank 0's value, on every rank."""
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def share(tensors: Iterable[Tensor]) -> None:
    """Overwrites the tensors of every rank with rank 0's: another machine may have initialised or read them differently."""
    if dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def mean(value: Tensor) -> Tensor:
    """The mean of a number over the ranks."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def means(values: list[float], device: torch.device) -> Callable[[], list[float]]:
    """The means of some numbers over the ranks, as a function that waits for them only when it is called."""
    if dist.get_world_size() == 1:
        return lambda: values
    total = mean(to_device(torch.tensor(values, dtype=torch.float64), device)).to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream().record_event() if device.type == "cuda" else None

    def read() -> list[float]:
        if arrived is not None:
            arrived.synchronize()
        return total.tolist()

    return read


def wait() -> None:
    # Without a device NCCL guesses one and prints a warning of four lines.
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def gathered(mine: list) -> list:
    """The rows of all ranks in rank order, on every rank."""
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, mine)
    return [row for part in rows for row in part]


def world_size() -> int:
    """Number of ranks in the run; works before the process group is joined."""
    return int(os.environ.get("WORLD_SIZE", 1))


def lost_a_rank(error: Exception) -> bool:
    """Whether an error only means that another rank has ended, which itself says why."""
    ended = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(words in str(error) for words in ended)


def leave(kind: type | None = None, error: BaseException | None = None, trace=None) -> None:
    """Ends the run's process group, unless there was an error: the other ranks would then fail at once and hide its cause.

    A group of one stays, since a later run in the same process joins it again.
    """
    if not clear_single_process_defaults() and error is None:
        end_group()


def end_group() -> None:
    """Ends the process group and its threads. A Gloo thread that frees a tensor during Python's shutdown aborts the process and
    so changes its exit code (github.com/pytorch/pytorch/issues/190489)."""
    import deepspeed

    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    gc.collect()  # a finished run's engine keeps the group alive in a reference cycle, and the threads end with the group
