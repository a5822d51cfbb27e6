"""DeepSpeed ZeRO: starts the engine, and gathers and scatters its sharded state by parameter name.

The only file that imports deepspeed, and only inside functions: a configuration is refused before it is loaded.
"""

import fcntl
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from duotone.data.refusal import Refused
from duotone.engine.optimizer import AdamWEma


@dataclass(frozen=True, kw_only=True)
class Zero:
    """How the training state is sharded over the ranks."""

    stage: Literal[1, 2, 3] = 1
    """1: optimizer and EMA; 2: gradients too; 3: weights too."""
    bucket: int = 50_000_000
    """Elements reduced or gathered at once."""


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
        refuse_without_compiler()
    single_process_defaults()
    import deepspeed

    quiet()
    if not on_cuda:
        build_communication_operator()
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if on_cuda else "gloo", verbose=False)
    local = int(os.environ["LOCAL_RANK"])
    if on_cuda:
        torch.cuda.set_device(local)
    return Ranks(
        dist.get_rank(), dist.get_world_size(), torch.device("cuda", local) if on_cuda else torch.device("cpu")
    )


def refuse_without_compiler() -> None:
    """DeepSpeed builds its CPU communication operator on first use, with g++ and ninja."""
    # This environment's own ninja comes first: two versions of ninja rebuild each other's work at every start.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise Refused(
            f"{' and '.join(missing)} not found: DeepSpeed compiles an operator on the CPU the first time; "
            "install them (Debian: apt-get install g++ ninja-build)"
        )


def build_communication_operator() -> None:
    """Builds DeepSpeed's CPU operator under a lock that dies with its holder.

    torch's own lock is a file that a killed process leaves behind, and the next one would wait for it for ever.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with open(folder.with_name(f"{folder.name}.duotone-lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


SET_HERE: dict[str, str] = {}  # what a process without a launcher was given, to be taken back when its run ends


def single_process_defaults() -> None:
    """What the launcher sets, for a plain `python recipes/X.py`."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    SET_HERE.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(SET_HERE)


def quiet() -> None:
    """DeepSpeed logs every setting of every rank; ours is the plan line."""
    for name in [name for name in logging.root.manager.loggerDict if name.lower().startswith("deepspeed")]:
        logging.getLogger(name).setLevel(logging.ERROR)


def stage_taken(zero: Zero, precision: str, accumulation: int) -> tuple[int, str | None]:
    """The stage that runs, and why it is not the one asked for.

    DeepSpeed's stage 1 hands bf16 with fp32 accumulation to another optimizer, which lets non-finite gradients into the
    weights; stage 2 accumulates in fp32 and skips such a step.
    """
    if zero.stage == 1 and precision == "bf16" and accumulation > 1:
        return (
            2,
            "ZeRO-1 in bf16 with accumulation runs as ZeRO-2, which adds up gradients in fp32 and skips non-finite ones",
        )
    return zero.stage, None


def settings(zero: Zero, *, batch: int, micro: int, accumulation: int, precision: str, clip: float) -> dict:
    """DeepSpeed's own configuration."""
    stage, _ = stage_taken(zero, precision, accumulation)
    # One micro-batch adds nothing up, so the type it would be added up in is the gradients' own.
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
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": zero.bucket,
            "allgather_bucket_size": zero.bucket,
            "stage3_param_persistence_threshold": 0,
        },
    }


class Sharded:
    """A network under ZeRO: forward, backward, step, and its state by name."""

    def __init__(self, network: nn.Module, optimizer: AdamWEma, config: dict):
        import deepspeed

        self.optimizer = optimizer
        self.stage = config["zero_optimization"]["stage"]
        self.names = {id(p): name for name, p in network.named_parameters() if p.requires_grad}
        self.engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
        self.device = self.engine.device

    def __call__(self, *inputs):
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> bool:
        """One micro-step; at the end of an accumulation the update. True if the update was skipped."""
        before = self.engine.skipped_steps
        self.engine.step()
        return self.engine.skipped_steps > before

    def grad_norm(self) -> float:
        return float(self.engine.get_global_grad_norm() or 0.0)

    @property
    def loss_scale(self) -> float:
        return float(self.engine.optimizer.loss_scale)

    # State by name. A flat shard holds pieces of parameters; Piece says which.

    def shards(self) -> Iterator[tuple[Tensor, list["Piece"]]]:
        """Every flat fp32 shard of this rank, with the parameters laid out in it."""
        zero = self.engine.optimizer
        if self.stage == 3:
            for shard, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups):
                yield shard, self.pieces_of_stage_3(parameters)
        else:
            for group, shard in enumerate(zero.single_partition_of_fp32_groups):
                parameters = zero.round_robin_bit16_groups[group]
                offsets = zero.round_robin_bit16_offsets[group]
                yield shard, [Piece(self.names[id(p)], tuple(p.shape), o, None) for p, o in zip(parameters, offsets)]

    def pieces_of_stage_3(self, parameters: list) -> list["Piece"]:
        pieces, offset = [], 0
        for p in parameters:
            pieces.append(Piece(self.names[id(p)], tuple(p.ds_shape), offset, p.partition_numel()))
            offset += p.partition_numel()
        return pieces

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every trained parameter's shape by name."""
        return {piece.name: piece.shape for _, pieces in self.shards() for piece in pieces}

    def gather(self, kind: str, *, to_rank_0: bool = True) -> dict[str, Tensor]:
        """All of `weight`, `exp_avg`, `exp_avg_sq` or `ema`, by name, fp32 on the CPU; empty on other ranks."""
        named: dict[str, Tensor] = {}
        for shard, pieces in self.shards():
            values = shard.detach() if kind == "weight" else self.optimizer.state_of(shard)[kind]
            parts_RP = self.all_gather(values)
            if dist.get_rank() == 0 or not to_rank_0:
                named |= {piece.name: piece.cut(parts_RP) for piece in pieces}
        return named

    def all_gather(self, values: Tensor) -> Tensor:
        """The shards of every rank, (ranks, elements), on the CPU."""
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.stack([part.cpu() for part in parts])

    @torch.no_grad()
    def scatter(self, kind: str, named: dict[str, Tensor]) -> None:
        """Puts named tensors into this rank's shards; every rank must hold them."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for shard, pieces in self.shards():
            target = shard.data if kind == "weight" else self.optimizer.state_of(shard)[kind]
            parts_RP = target.new_zeros(ranks, target.numel(), device="cpu")
            for piece in pieces:
                piece.paste(parts_RP, named[piece.name])
            target.copy_(parts_RP[rank])
        if kind == "weight":
            self.refresh_weights()

    def refresh_weights(self) -> None:
        """The network's own weights from the fp32 shards."""
        zero = self.engine.optimizer
        if self.stage == 3:
            for i in range(len(zero.fp32_partitioned_groups_flat)):
                zero.fp16_partitioned_groups_flat[i].data.copy_(zero.fp32_partitioned_groups_flat[i].data)
                zero._unflatten_partitioned_parameters(i)
        else:
            zero.update_lp_params()

    def counters(self) -> dict:
        """The integers of the optimizer's state."""
        shard, _ = next(iter(self.shards()))
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        scale = {
            k: getattr(scaler, k)
            for k in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
            if hasattr(scaler, k)
        }
        return {
            "adam_steps": self.optimizer.state_of(shard)["step"],
            "skipped": self.engine.skipped_steps,
            "scaler": scale,
        }

    def restore_counters(self, counters: dict) -> None:
        for shard, _ in self.shards():
            self.optimizer.state_of(shard)["step"] = counters["adam_steps"]
        self.engine.skipped_steps = counters["skipped"]
        for name, value in counters["scaler"].items():
            setattr(self.engine.optimizer.loss_scaler, name, value)


@dataclass(frozen=True)
class Piece:
    """Where a parameter lies in the shards: at `offset` of all of them end to end (stages 1 and 2), or, at stage 3,
    `per_rank` elements at `offset` of each."""

    name: str
    shape: tuple[int, ...]
    offset: int
    per_rank: int | None

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def cut(self, parts_RP: Tensor) -> Tensor:
        if self.per_rank is None:
            return parts_RP.flatten()[self.offset : self.offset + self.size].view(self.shape).clone()
        return parts_RP[:, self.offset : self.offset + self.per_rank].flatten()[: self.size].view(self.shape).clone()

    def paste(self, parts_RP: Tensor, value: Tensor) -> None:
        if self.per_rank is None:
            parts_RP.view(-1)[self.offset : self.offset + self.size] = value.flatten()
            return
        padded = parts_RP.new_zeros(parts_RP.shape[0] * self.per_rank)
        padded[: self.size] = value.flatten()
        parts_RP[:, self.offset : self.offset + self.per_rank] = padded.view(parts_RP.shape[0], self.per_rank)


@contextmanager
def rank_0_first(ranks: Ranks):
    """Work that rank 0 does before the others look at its result."""
    if ranks.rank:
        dist.barrier()
    yield
    if not ranks.rank:
        dist.barrier()


def mean(value: Tensor) -> Tensor:
    """The mean of a number over the ranks."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def wait() -> None:
    dist.barrier()


def gathered(mine: list) -> list:
    """The rows of every rank, on every rank."""
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, mine)
    return [row for part in rows for row in part]


def world_size() -> int:
    """Ranks of the run, before it is joined."""
    return int(os.environ.get("WORLD_SIZE", 1))


def leave() -> None:
    """Ends the run's process group. A group of one stays, since a later run in the same process joins it again."""
    if SET_HERE:
        for name in SET_HERE:
            os.environ.pop(name, None)
        SET_HERE.clear()
    elif dist.is_initialized():
        dist.destroy_process_group()
