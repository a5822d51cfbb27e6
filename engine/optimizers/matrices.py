"""Whole weight matrices from ZeRO's shards, which may cut them: a group's flat parameters are split where shards end.

A convolution counts as the matrix of its output channels by input channels x kernel. Matrices that several ranks share are
assembled by one all-reduce. K matrices of one shape, M x N; P parameters of one rank's shard.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """The place and shape of a weight in the flat parameters of its group."""

    rows: int
    columns: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.columns

    def within(self, first: int, last: int) -> slice:
        """The range of its elements that lies between two positions in the flat parameters."""
        return slice(max(first - self.offset, 0), max(min(self.end, last) - self.offset, 0))


class Matrices:
    """The matrices of a group of which this rank's shard holds at least a part."""

    def __init__(self, shapes: list[torch.Size], offsets: list[int], shard: int, rank: int):
        """`shard` is the number of elements that each rank holds."""
        laid = [Matrix(shape[0], shape[1:].numel(), offset) for shape, offset in zip(shapes, offsets)]
        self.first, self.last = rank * shard, (rank + 1) * shard
        self.mine = [m for m in laid if m.offset < self.last and m.end > self.first]
        self.places: dict[Matrix, int] = {}  # offset of each cut matrix in put_together(); the same on every rank
        self.cut = 0
        for matrix in laid:
            if matrix.offset // shard != (matrix.end - 1) // shard:
                self.places[matrix] = self.cut
                self.cut += matrix.rows * matrix.columns

    def each(self, flat_P: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The shard with `change` applied to every matrix, in batches (K, M, N) of one shape; zeros in the padding."""
        out_P, alike = torch.zeros_like(flat_P), defaultdict(list)
        for matrix, value_MN in self.whole(flat_P):
            alike[value_MN.shape].append((matrix, value_MN))
        for pairs in alike.values():
            changed_KMN = change(torch.stack([value_MN for _, value_MN in pairs]))
            for (matrix, _), changed_MN in zip(pairs, changed_KMN):
                self.part(out_P, matrix).copy_(changed_MN.flatten()[matrix.within(self.first, self.last)])
        return out_P

    def whole(self, flat_P: Tensor) -> Iterator[tuple[Matrix, Tensor]]:
        """Each matrix of this rank, whole: (M, N), with the parts that other ranks hold."""
        together = self.put_together(flat_P)
        for matrix in self.mine:
            if matrix in self.places:
                place = self.places[matrix]
                value = together[place : place + matrix.rows * matrix.columns]
            else:
                value = self.part(flat_P, matrix)
            yield matrix, value.view(matrix.rows, matrix.columns)

    def put_together(self, flat_P: Tensor) -> Tensor:
        """The matrices that are cut between ranks, end to end: each rank copies its parts into zeros, then all ranks sum."""
        together = flat_P.new_zeros(self.cut)
        for matrix in self.mine:
            if matrix in self.places:
                held, place = matrix.within(self.first, self.last), self.places[matrix]
                together[place + held.start : place + held.stop] = self.part(flat_P, matrix)
        if self.cut:
            dist.all_reduce(together)
        return together

    def part(self, flat_P: Tensor, matrix: Matrix) -> Tensor:
        """The view of the shard that holds the matrix, or its part on this rank."""
        held = matrix.within(self.first, self.last)
        return flat_P[matrix.offset + held.start - self.first : matrix.offset + held.stop - self.first]
