"""The update of ZeRO stages 1 and 2: two passes over the shard instead of DeepSpeed's check, cast, clip, copy and cast back.

The first pass sums the squares of the reduced gradients; the second reads each gradient once more and writes weights, moments,
EMA and the network's own weights. Whether a step is skipped is decided on the device, so the host waits for nothing.
P parameters of one rank's shard of one group.
"""

import itertools
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from duotone.engine.distributed import zero
from duotone.engine.optimizers.adamw import AdamWEma
from duotone.engine.optimizers.matrices import Matrices
from duotone.kernels.squared_norm import squared_norm


class Update:
    """Replaces `step` of DeepSpeed's partitioned optimizer."""

    def __init__(self, partitioned, optimizer: AdamWEma, *, clip: float):
        self.partitioned, self.optimizer, self.clip = partitioned, optimizer, clip
        # Numbers live on the device, so that a captured step can be replayed with new ones.
        number = {"dtype": torch.float64, "device": partitioned.device}
        self.lr, self.decay = torch.zeros((), **number), torch.zeros((), **number)
        self.steps, self.skipped = torch.zeros((), **number), torch.zeros((), **number)
        self.flats: dict[int, Tensor] = {}
        self.laid: dict[int, Matrices] = {}

    @torch.no_grad()
    def __call__(self, closure=None) -> None:
        self.set_rates()
        squares = self.apply([self.gradient(group) for group in self.groups()])
        for group in self.groups():
            self.release(group)
        if dist.get_world_size() > 1:
            zero.gather_weights(self.partitioned)
        self.tell(squares)

    def groups(self) -> range:
        return range(len(self.partitioned.bit16_groups))

    def set_rates(self) -> None:
        """Copies the learning rate and EMA decay, which all groups share, to the device."""
        options = self.optimizer.param_groups[0]
        self.lr.fill_(options["lr"])
        self.decay.fill_(options["ema_decay"])

    @torch.no_grad()
    def apply(self, gradients: list[Tensor]) -> Tensor:
        """The update itself, whose inputs are all tensors on the device; returns the gradients' squared norm over all ranks."""
        squares = sum(squared_norm(grad_P) for grad_P in gradients)
        if dist.get_world_size() > 1:
            dist.all_reduce(squares, group=self.partitioned.dp_process_group)
        scale = self.counted_scale(squares)
        for group, grad_P in enumerate(gradients):
            self.update(group, grad_P, scale)
        return squares

    def gradient(self, group: int) -> Tensor:
        """grad_P of a group: already flat where DeepSpeed accumulates in fp32, else concatenated from its pieces."""
        flat_P = self.partitioned._get_preflattened_grad_partition(group)
        if flat_P is not None:
            return flat_P
        pieces = [piece.reshape(-1) for piece in self.partitioned.averaged_gradients[group]]
        if group not in self.flats:
            self.flats[group] = pieces[0].new_zeros(self.shard(group).numel())
        torch.cat(pieces, out=self.flats[group][: sum(piece.numel() for piece in pieces)])
        return self.flats[group]

    # With a single rank the shards hold every parameter, so gradients can also come from autograd directly.

    def parameters(self) -> list[Tensor]:
        return [p for parameters in self.partitioned.params_in_partition for p in parameters]

    def laid_flat(self, gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
        """The gradients of `parameters` as `gradient` gives them, one grad_P per group; zeros where a gradient is None."""
        rows, following = [], iter(zip(self.parameters(), gradients))
        for group, parameters in enumerate(self.partitioned.params_in_partition):
            pieces = [
                (p.new_zeros(p.shape) if gradient is None else gradient).reshape(-1)
                for p, gradient in itertools.islice(following, len(parameters))
            ]
            missing = self.shard(group).numel() - sum(piece.numel() for piece in pieces)
            rows.append(torch.cat([*pieces, pieces[0].new_zeros(missing)]))
        return rows

    def state(self) -> dict[str, Tensor]:
        """All tensors that an update changes, by name."""
        named = {"steps": self.steps, "skipped": self.skipped}
        for group in self.groups():
            shard = self.shard(group)
            state = self.optimizer.state_of(shard)
            named |= {f"{kind} {group}": state[kind] for kind in self.optimizer.STATE if kind in state}
            named |= {f"master {group}": shard.data, f"weight {group}": self.partitioned.bit16_groups_flat[group].data}
        return named

    def shard(self, group: int) -> Tensor:
        return self.partitioned.single_partition_of_fp32_groups[group]

    def counted_scale(self, squares: Tensor) -> Tensor:
        """Counts the step as taken or skipped; returns the factor for gradients, which unscales and clips them; NaN to skip."""
        finite = squares.isfinite()
        self.steps += finite
        self.skipped += ~finite
        loss_scale = self.partitioned.loss_scale
        norm = squares.sqrt() / loss_scale
        clipped = ((norm + 1e-6) / self.clip).clamp(min=1.0) if self.clip > 0 else torch.ones_like(norm)
        return torch.where(finite, 1 / (loss_scale * clipped), torch.nan)

    def update(self, group: int, grad_P: Tensor, scale: Tensor) -> None:
        self.optimizer.move(
            self.shard(group),
            grad_P,
            self.optimizer.param_groups[group],
            step=self.steps,
            lr=self.lr,
            ema_decays=[self.decay],
            grad_scale=scale,
            weights_out=self.partitioned.parallel_partitioned_bit16_groups[group][dist.get_rank()].data,
            matrices=partial(self.matrices, group),
        )

    def matrices(self, group: int) -> Matrices:
        """The layout of a group's matrices in this rank's shard."""
        if group not in self.laid:
            parameters = self.partitioned.round_robin_bit16_groups[group]
            offsets = self.partitioned.round_robin_bit16_offsets[group]
            shapes, shard = [p.shape for p in parameters], self.shard(group).numel()
            self.laid[group] = Matrices(shapes, offsets, shard, dist.get_rank())
        return self.laid[group]

    def release(self, group: int) -> None:
        """Frees the gradients of a group as DeepSpeed's own step does."""
        partitioned = self.partitioned
        partitioned.free_grad_in_param_list(partitioned.params_in_partition[group])
        partitioned.free_grad_in_param_list(partitioned.params_not_in_partition[group])
        partitioned._release_preflattened_grad_buffers(group)
        partitioned.averaged_gradients[group] = None
        partitioned.all_grad_tensors[group] = None

    def tell(self, squares: Tensor) -> None:
        """Sets what DeepSpeed reads after a step; only fp16's dynamic loss scale has to wait to know whether it was skipped."""
        self.partitioned._global_grad_norm = squares.sqrt() / self.partitioned.loss_scale
        self.partitioned.overflow = self.partitioned.dtype == torch.float16 and not squares.isfinite().item()
        self.partitioned._update_scale(self.partitioned.overflow)
