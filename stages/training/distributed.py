"""The processes that train one model together. One process alone is a team of one, and never loads torch.distributed.

A global batch is dealt out in contiguous shares, the first of which may be larger by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Sum(torch.autograd.Function):
    """The derivative of all parts of the loss by what this process put in is the sum of what each of them asks for."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        del context
        return _total(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        del context
        return _total(gradient)


def _total(values: Tensor) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total


@dataclass(frozen=True)
class Team:
    """This process's place among those that train together; every method but `share` must be called by all of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and tells of progress."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Positions of this process among `count`."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def largest_share(self, count: int) -> int:
        """Positions of the process that has most of them."""
        return -(-count // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over all processes; no gradient."""
        return values if self.size == 1 else _total(values)

    def sum_with_gradient(self, values: Tensor) -> Tensor:
        """As `sum`, where every process goes on to compute its part of one loss with the result."""
        return values if self.size == 1 else _Sum.apply(values)

    def any(self, flag: bool) -> bool:
        """Whether it is true for any process. Only hosts wait for each other here, never for a GPU."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def rows(self, mine: Tensor, count: int) -> Tensor:
        """(share, …) of every process → (count, …), in order."""
        if self.size == 1:
            return mine
        largest = self.largest_share(count)
        padded = mine.new_zeros(largest, *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded)
        shares = [len(Team(self.device, rank, self.size).share(count)) for rank in range(self.size)]
        return torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])

    def wait_for_all(self) -> None:
        """Until every process has come here."""
        self.any(False)
