"""A uniform sample of a stream that is too long to be held.

Axis legend: N rows of the stream, d their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
        # A batch may be large, and its sum needs float64 copies, so it is added in parts.
        for start in range(0, len(rows), PART):
            self._add(rows[start : start + PART])

    def _add(self, rows: np.ndarray) -> None:
        # The former sum comes first, so that the additions are the same however the rows are cut into batches.
        self.total = np.concatenate([self.total[None], rows]).sum(0)
        free = min(max(len(self._held) - self.seen, 0), len(rows))
        self._held[self.seen : self.seen + free] = rows[:free]
        late = np.arange(self.seen + free, self.seen + len(rows))  # places in the stream of rows that found no room
        slots = (self._random.random(len(late)) * (late + 1)).astype(np.int64)
        kept = np.flatnonzero(slots < len(self._held))
        # Where two rows want one slot, NumPy leaves the later one in it, as if they had come one by one.
        self._held[slots[kept]] = rows[free + kept]
        self.seen += len(rows)

    def draw(self, count: int) -> np.ndarray:
        """(count, d): some of the rows that are held, each as likely as any other, or a view of all of them."""
        if count == len(self.rows):
            return self.rows
        # The first rows would be no fair sample, because a row's slot still depends on when it came.
        random = np.random.default_rng([*self.seed, count])
        return self.rows[np.sort(random.choice(len(self.rows), count, replace=False))]
