"""A network under ZeRO: forward, backward, update, and its sharded state, gathered and scattered by parameter name."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from duotone.data.refusal import Refused
from duotone.engine.distributed import zero
from duotone.engine.distributed.update import Update
from duotone.engine.optimizers.adamw import AdamWEma

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The state of DeepSpeed's dynamic loss scaler."""


class Sharded:
    """A network under ZeRO: forward, backward, step, and its state by name."""

    def __init__(self, network: nn.Module, optimizer: AdamWEma, config: dict):
        refuse_other_steps(optimizer)
        self.optimizer = optimizer
        self.stage = config["zero_optimization"]["stage"]
        self.names = {id(p): name for name, p in trained(network)}
        rounds = config["bf16"]["enabled"] or config["fp16"]["enabled"]
        zero.share(p for _, p in trained(network))
        exact = {name: p.detach().to("cpu", copy=True) for name, p in trained(network)} if rounds else {}
        self.linear_before = F.linear
        self.engine = zero.start(network, optimizer, config)
        self.device = self.engine.device
        self.update = None
        if self.stage < 3:
            self.update = Update(self.engine.optimizer, optimizer, clip=config["gradient_clipping"])
            self.engine.optimizer.step = self.update
        if exact:  # DeepSpeed makes its fp32 weights from the rounded ones
            self.scatter("weight", exact)
            self.scatter("ema", exact)

    def __call__(self, *inputs):
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        """Ends one micro-batch; after the last of an accumulation it updates the weights, unless a gradient is not finite."""
        self.engine.step()

    def close(self, kind: type | None = None, error: BaseException | None = None, trace=None) -> None:
        """Removes DeepSpeed's hooks from the weights; they would keep the network and its whole training state alive.

        This waits for the device, so it is left out after an error on a GPU, which may be in a collective that a lost rank
        never joins.
        """
        F.linear = self.linear_before  # stage 3 replaces it, for the whole process, by one that rounds differently
        if error is None or self.device.type == "cpu":
            self.engine.destroy()

    @property
    def skipped(self) -> int:
        """Number of updates skipped so far; reading it waits for the device."""
        return int(self.update.skipped) if self.update else self.engine.skipped_steps

    def grad_norm(self) -> float:
        return float(self.engine.get_global_grad_norm() or 0.0)

    # State by name. A flat shard holds pieces of parameters; a Piece says where.

    def shards(self) -> Iterator[tuple[Tensor, list["Piece"]]]:
        """Every flat fp32 shard of this rank, with the parameters laid out in it."""
        partitioned = self.engine.optimizer
        if self.stage == 3:
            for shard, parameters in zip(partitioned.fp32_partitioned_groups_flat, partitioned.fp16_groups):
                yield shard, self.pieces_of_stage_3(parameters)
        else:
            for group, shard in enumerate(partitioned.single_partition_of_fp32_groups):
                parameters = partitioned.round_robin_bit16_groups[group]
                offsets = partitioned.round_robin_bit16_offsets[group]
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
        """All of `weight`, `exp_avg`, `exp_avg_sq` or `ema`, by parameter name, fp32 on the CPU; with to_rank_0, empty elsewhere."""
        named: dict[str, Tensor] = {}
        for shard, pieces in self.shards():
            values = shard.detach() if kind == "weight" else self.optimizer.state_of(shard).get(kind)
            if values is None:
                continue
            parts = self.all_gather(values)
            if dist.get_rank() == 0 or not to_rank_0:  # spares the other ranks a full copy in CPU memory
                parts_RP = torch.stack([part.cpu() for part in parts])
                named |= {piece.name: piece.cut(parts_RP) for piece in pieces}
        return named

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """This tensor of every rank, in rank order."""
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return parts

    @torch.no_grad()
    def scatter(self, kind: str, named: dict[str, Tensor]) -> None:
        """Copies named tensors into this rank's shards; every rank must be given all of them."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for shard, pieces in self.shards():
            target = shard.data if kind == "weight" else self.optimizer.state_of(shard).get(kind)
            if target is None:
                continue
            parts_RP = target.new_zeros(ranks, target.numel(), device="cpu")
            for piece in pieces:
                piece.paste(parts_RP, named[piece.name])
            target.copy_(parts_RP[rank])
        if kind == "weight":
            self.refresh_weights()

    def refresh_weights(self) -> None:
        """Copies the fp32 shards into the network's own weights."""
        partitioned = self.engine.optimizer
        if self.stage == 3:
            for i, shard in enumerate(partitioned.fp32_partitioned_groups_flat):
                partitioned.fp16_partitioned_groups_flat[i].data.copy_(shard.data)
                partitioned._unflatten_partitioned_parameters(i)
        else:
            partitioned.update_lp_params()

    def counters(self) -> dict:
        """The counters of the optimizer's state: steps taken, steps skipped, and the loss scaler's."""
        scaler = self.fp16_scaler
        return {
            "adam_steps": int(self.update.steps) if self.update else self.steps_of_stage_3(),
            "skipped": self.skipped,
            "scaler": {} if scaler is None else {name: getattr(scaler, name) for name in SCALER},
        }

    @property
    def fp16_scaler(self):
        """DeepSpeed's dynamic loss scaler; None for the other precisions, whose constant scale must not be restored in another run."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return scaler if all(hasattr(scaler, name) for name in SCALER) else None

    def steps_of_stage_3(self) -> int:
        shard, _ = next(iter(self.shards()))
        return self.optimizer.state_of(shard)["step"]

    def restore_counters(self, counters: dict) -> None:
        if self.update:
            self.update.steps.fill_(counters["adam_steps"])
            self.update.skipped.fill_(counters["skipped"])
        for shard, _ in self.shards():
            self.optimizer.state_of(shard)["step"] = counters["adam_steps"]
        self.engine.skipped_steps = counters["skipped"]
        stored = counters["scaler"]
        if self.fp16_scaler is not None and stored.keys() == set(SCALER):
            for name, value in stored.items():
                setattr(self.fp16_scaler, name, value)


def trained(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in network.named_parameters() if p.requires_grad)


def refuse_other_steps(optimizer: torch.optim.Optimizer) -> None:
    """Raises Refused on an optimizer with its own `step`: every ZeRO stage updates through `move`, so it would never be called."""
    own = inspect.unwrap(type(optimizer).step)  # PyTorch wraps a class's step when the class is first used
    if not isinstance(optimizer, AdamWEma) or own is not inspect.unwrap(AdamWEma.step):
        raise Refused(
            f"optimizer: the step of {type(optimizer).__name__} would never be called: make it an AdamWEma that overrides "
            "`move` (engine/optimizers/adamw.py)"
        )


@dataclass(frozen=True)
class Piece:
    """Where a parameter lies in the shards: at `offset` in all shards laid end to end (stages 1 and 2); at stage 3, `per_rank`
    elements at `offset` in each shard."""

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
