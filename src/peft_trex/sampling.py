"""A uniform sample of a stream that is too long to be held, drawn by one process or by several together.

Axis legend: N rows of the stream, d their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")
PART = 1000  # rows that are worked on at a time


class Reservoir:
    """Rows of a stream, each as likely as any other, and the sum of all rows.

    As long as the stream fits, all of it is held, in order. After that a new row takes the place of a held one by
    chance (Vitter 1985, algorithm R), so that a stream which comes sorted is sampled as well as a shuffled one. What
    is drawn depends on the seed and the rows, not on how they are cut into batches.

    Args:
        capacity: rows to hold at most.
        dim: d.
        seed: of the sampling.
    """

    def __init__(self, capacity: int, dim: int, seed: Sequence[int]) -> None:
        self.seed = list(seed)
        self.seen = 0  # N
        self.total = np.zeros(dim)  # (d,), float64: of all rows, also those that are no longer held
        self._held = np.empty((capacity, dim), np.float32)  # takes memory only where it has been written to
        self._random = np.random.default_rng(self.seed)

    @property
    def rows(self) -> np.ndarray:
        """(min(N, capacity), d), a view."""
        return self._held[: self.seen]

    def add(self, rows: np.ndarray) -> None:
        """Take over rows (n, d), float32."""
        for start in range(0, len(rows), PART):  # a batch may be large, and what is made of it is larger
            self._add(rows[start : start + PART])

    def _add(self, rows: np.ndarray) -> None:
        # one after the other, the former sum first: the same additions however the rows are cut into batches
        self.total = np.concatenate([self.total[None], rows]).sum(0)
        fit = min(max(len(self._held) - self.seen, 0), len(rows))
        self._held[self.seen : self.seen + fit] = rows[:fit]
        numbers = np.arange(self.seen + fit, self.seen + len(rows))  # of the rows that came too late, in the stream
        slots = (self._random.random(len(numbers)) * (numbers + 1)).astype(np.int64)
        kept = np.flatnonzero(slots < len(self._held))
        self._held[slots[kept]] = rows[fit + kept]  # where two want one place, the later gets it
        self.seen += len(rows)

    def draw(self, count: int) -> np.ndarray:
        """(count, d): some of the rows that are held, each as likely as any other, or a view of all of them."""
        if count == len(self.rows):
            return self.rows
        # the first ones would not do: which row is where still depends on when it came
        random = np.random.default_rng([*self.seed, count])
        return self.rows[np.sort(random.choice(len(self.rows), count, replace=False))]


class Ranks:
    """The processes that work on one thing together: those of torch.distributed, or this one alone.

    They talk in a group of their own, over gloo: a data loader may have the default group's attention at any time, and
    NCCL knows no tensors on the CPU. Leaving the context closes the group, so that a process which leaves early, by an
    error or an interrupt, is noticed by the others when they next meet, and they raise too.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self._group = None
        if self.size > 1:
            with _talking():  # the others may be gone before this one has a connection to each
                self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None  # an error's traceback may hold this object, and would keep the connections open

    def exchange(self, value: T) -> list[T]:
        """Every rank's value, by rank. All ranks must call it, as they must the other methods."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            with _talking():
                dist.all_gather_object(found, value, self._group)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on all ranks; if it raises there, all raise.

        It is returned only when it has arrived everywhere.
        """
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        error = None
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as problem:
                error, made[1] = problem, describe(problem)
        with _talking():
            dist.broadcast_object_list(made, 0, self._group)
        self.exchange(None)
        self.raise_together(error, [made[1]])
        return made[0]

    def raise_together(self, error: Exception | None, told: Sequence[str | None]) -> None:
        """Raise this rank's own error, or tell of another's; `told` has their descriptions by rank, or None."""
        if error is not None:
            raise error
        for rank, description in enumerate(told):
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
        shares = _shares(min(size, sum(seen)), seen)
        own = reservoir.draw(shares[self.rank])
        if self.size == 1:
            return own, reservoir.total
        if self.rank > 0:
            with _talking():
                dist.send(torch.from_numpy(reservoir.total), 0, self._group)
                dist.send(torch.from_numpy(own), 0, self._group)
            return None
        rows = np.empty((sum(shares), own.shape[1]), np.float32)
        rows[: len(own)] = own
        total, part, start = reservoir.total.copy(), np.empty_like(reservoir.total), len(own)
        for rank in range(1, self.size):
            with _talking():
                dist.recv(torch.from_numpy(part), rank, self._group)
                dist.recv(torch.from_numpy(rows[start : start + shares[rank]]), rank, self._group)
            total += part
            start += shares[rank]
        return rows, total


def describe(error: Exception | None) -> str | None:
    """What one rank tells the others of its error; the error itself might not travel."""
    return None if error is None else f"{type(error).__name__}: {error}"


def _shares(size: int, seen: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `size`, in proportion to `seen`; none is larger than its number there."""
    everything = max(sum(seen), 1)
    shares = [size * count // everything for count in seen]
    by_rest = sorted(range(len(seen)), key=lambda rank: (-(size * seen[rank] % everything), rank))
    for rank in by_rest[: size - sum(shares)]:
        shares[rank] += 1
    return shares


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "Another rank left or did not answer in time: it failed, was interrupted or killed, or never came here, "
            "as all ranks must. See what it printed. The prior was left as it was."
        ) from error
