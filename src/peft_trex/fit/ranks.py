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


@contextmanager
def talking() -> Iterator[None]:
    """Turn an error of the connection into one that says what may have happened."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        # It is a RuntimeError, too.
        raise
    except RuntimeError as error:
        raise RuntimeError(
            "Another rank left or did not answer in time: it failed, was interrupted or killed, or never came here, "
            "as all ranks must. See what it printed. The prior was left as it was."
        ) from error


class Ranks:
    """The processes of torch.distributed, or this one alone; all of them must call each method.

    They talk in a group of their own, over gloo: a data loader may use the default group at any time, and NCCL takes
    no tensors on the CPU. A process that leaves early, by an error or an interrupt, must close it: then the others
    raise at their next meeting.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self._group = None
        if self.size > 1:
            # The others may be gone before this one has a connection to each.
            with talking():
                self._group = dist.new_group(backend="gloo")

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            # An error's traceback may hold this object, and would keep the connections open.
            self._group = None

    def exchange(self, value: T, error: Exception | None = None) -> list[T]:
        """Every rank's value, by rank. If a rank brings an error, it raises that, and the others one that tells it."""
        # The error itself might not travel, so it is put into words.
        problem = None if error is None else f"{type(error).__name__}: {error}"
        entries: list[Any] = [(value, problem)] * self.size
        if self.size > 1:
            with talking():
                dist.all_gather_object(entries, entries[0], self._group)
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(entries):
            if problem is not None:
                raise RuntimeError(f"Rank {rank} failed, so no rank went on. There: {problem}")
        return [each for each, _ in entries]

    def agree(self, value: T | None) -> T | None:
        """The value that all ranks bring; None if they bring different ones."""
        values = self.exchange(value)
        return value if all(each == values[0] for each in values) else None

    def together(self, work: Callable[[], None]) -> None:
        """Do this on all ranks; if it raises on one, all raise."""
        error = None
        try:
            work()
        except Exception as problem:
            error = problem
        self.exchange(None, error)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, once it has arrived on all ranks; if it raises there, all raise."""
        made: list[Any] = [None]
        error = None
        if self.rank == 0:
            try:
                made = [make()]
            except Exception as problem:
                error = problem
        if self.size > 1:
            with talking():
                dist.broadcast_object_list(made, 0, self._group)
        self.exchange(None, error)
        return made[0]

    @talking()
    def gather(self, reservoir: Reservoir, seen: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A sample of all ranks' rows, at most `size`, and the sum of all rows: (n, d) and (d,), on rank 0 only.

        Each rank sends as large a share of it as its stream, of `seen` rows, is of all. The rows are in the order of
        the ranks. The reservoir is this rank's, and its capacity is at least `size`.
        """
        counts = shares(min(size, sum(seen)), seen)
        drawn, total = reservoir.draw(counts[self.rank]), reservoir.total
        if self.size == 1:
            return drawn, total
        if self.rank > 0:
            dist.send(torch.from_numpy(total), 0, self._group)
            dist.send(torch.from_numpy(drawn), 0, self._group)
            return None
        rows, addend = np.empty((sum(counts), drawn.shape[1]), np.float32), np.empty_like(total)
        by_rank = np.split(rows, np.cumsum(counts)[:-1])
        by_rank[0][:] = drawn
        for rank in range(1, self.size):
            dist.recv(torch.from_numpy(addend), rank, self._group)
            dist.recv(torch.from_numpy(by_rank[rank]), rank, self._group)
            total = total + addend
        return rows, total


def shares(size: int, seen: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `size`, in proportion to `seen`; none is larger than its number there."""
    everything = max(sum(seen), 1)
    counts = [size * count // everything for count in seen]
    by_rest = sorted(range(len(seen)), key=lambda rank: -(size * seen[rank] % everything))
    for rank in by_rest[: size - sum(counts)]:
        counts[rank] += 1
    return counts
