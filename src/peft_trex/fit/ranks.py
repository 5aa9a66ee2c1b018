"""The processes that fit one prior together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from .reservoir import Reservoir

T = TypeVar("T")


class Ranks:
    """The processes of torch.distributed, or this one alone.

    They talk in a group of their own, over gloo: a data loader may use the default group at any time, and NCCL takes
    no tensors on the CPU. Leaving the context closes the group, so that the others notice when a process leaves early,
    by an error or an interrupt: at their next meeting they raise too. All ranks must call each method.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self._group = None
        if self.size > 1:
            # The others may be gone before this one has a connection to each.
            with talking():
                self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            # An error's traceback may hold this object, and would keep the connections open.
            self._group = None

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with talking():
                dist.all_gather_object(values, value, self._group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, once it has arrived on all ranks; if it raises there, all raise."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        error = None
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as problem:
                error, made[1] = problem, describe(problem)
        with talking():
            dist.broadcast_object_list(made, 0, self._group)
        self.exchange(None)
        self.raise_together(error, [made[1]])
        return made[0]

    def raise_together(self, error: Exception | None, descriptions: Sequence[str | None]) -> None:
        """Raise this rank's error, or one that tells of another's; `descriptions` has them by rank, or None."""
        if error is not None:
            raise error
        for rank, description in enumerate(descriptions):
            if description is not None:
                raise RuntimeError(f"Rank {rank} failed, so no rank went on. There: {description}")

    def gather(self, reservoir: Reservoir, seen: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A sample of all ranks' rows, at most `size`, and the sum of all rows: (n, d) and (d,), on rank 0.

        Each rank sends as large a share of it as its stream is of all; the rows are in the order of the ranks.

        Args:
            reservoir: this rank's, whose capacity is at least `size`.
            seen: rows of each rank's stream.
            size: rows to gather at most.
        """
        counts = shares(min(size, sum(seen)), seen)
        drawn = reservoir.draw(counts[self.rank])
        if self.size == 1:
            return drawn, reservoir.total
        if self.rank > 0:
            with talking():
                dist.send(torch.from_numpy(reservoir.total), 0, self._group)
                dist.send(torch.from_numpy(drawn), 0, self._group)
            return None
        rows = np.empty((sum(counts), drawn.shape[1]), np.float32)
        by_rank = np.split(rows, np.cumsum(counts)[:-1])
        by_rank[0][:] = drawn
        total, addend = reservoir.total.copy(), np.empty_like(reservoir.total)
        for rank in range(1, self.size):
            with talking():
                dist.recv(torch.from_numpy(addend), rank, self._group)
                dist.recv(torch.from_numpy(by_rank[rank]), rank, self._group)
            total += addend
        return rows, total


def describe(error: Exception | None) -> str | None:
    """An error in words for the other ranks, because the error itself might not travel."""
    return None if error is None else f"{type(error).__name__}: {error}"


def shares(size: int, seen: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `size`, in proportion to `seen`; none is larger than its number there."""
    everything = max(sum(seen), 1)
    counts = [size * count // everything for count in seen]
    by_rest = sorted(range(len(seen)), key=lambda rank: (-(size * seen[rank] % everything), rank))
    for rank in by_rest[: size - sum(counts)]:
        counts[rank] += 1
    return counts


@contextmanager
def talking() -> Iterator[None]:
    """Turns an error of the connection into one that says what may have happened."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "Another rank left or did not answer in time: it failed, was interrupted or killed, or never came here, "
            "as all ranks must. See what it printed. The prior was left as it was."
        ) from error
