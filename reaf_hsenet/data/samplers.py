"""Which rows of a split a rank reads, and in which order: a function of (seed, epoch), not of ranks or
workers.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class GlobalBatches(Sampler):
    """One epoch of batches of this rank, as lists of (epoch, row).

    The rows are shuffled by (seed, epoch) and cut into global batches; rank r takes its r-th part of each, so
    that a step's global batch is the same for any number of ranks. The incomplete last batch is left out.
    """

    def __init__(self, rows: int, per_rank: int, rank: int, world: int, seed: int):
        self.rows, self.per_rank, self.rank, self.world, self.seed = rows, per_rank, rank, world, seed
        self.epoch, self.first = 0, 0

    def start_at(self, epoch: int, first: int) -> None:
        """The next iteration yields epoch `epoch` from its batch `first` on."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return self.rows // (self.per_rank * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)
        for batch in range(self.first, len(self)):
            start = (batch * self.world + self.rank) * self.per_rank
            yield [(self.epoch, int(row)) for row in order[start : start + self.per_rank]]


class InOrder(Sampler):
    """This rank's rows of a split in order, for evaluation: every world-th, as batches of (0, row).

    Every rank has as many batches, for ranks that compute together; the last may be empty.
    """

    def __init__(self, rows: int, batch: int, rank: int, world: int):
        mine = range(rank, rows, world)
        self.batches = [[(0, row) for row in mine[i : i + batch]] for i in range(0, -(-rows // world), batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)
