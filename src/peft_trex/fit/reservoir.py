"""A uniform sample of a stream that is too long to be held.

Axis legend: N rows of the stream, d their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# So many rows are worked on at a time.
PART = 1000


class Reservoir:
    """Rows of a stream, each as likely as any other, and the sum of all rows.

    As long as the stream fits, all of it is held, in order. After that a new row takes the place of a held one by
    chance (Vitter 1985, algorithm R), so that a stream which comes sorted is sampled as well as a shuffled one. What
    is drawn depends on the seed and the rows, not on how they are cut into batches.
    """

    def __init__(self, capacity: int, dim: int, seed: Sequence[int]) -> None:
        self.seed = list(seed)
        self.seen = 0  # N
        self.total = np.zeros(dim)  # (d,), float64
        # The system gives memory to this only where a row has been written.
        self._held = np.empty((capacity, dim), np.float32)
        self._random = np.random.default_rng(self.seed)

    @property
    def rows(self) -> np.ndarray:
        """(min(N, capacity), d), a view."""
        return self._held[: self.seen]

    def add(self, batch: np.ndarray) -> None:
        """Take over rows (n, d), float32."""
        # A batch may be large, and its sum needs float64 copies, so it is added in parts.
        for start in range(0, len(batch), PART):
            rows = batch[start : start + PART]
            # The former sum comes first, so that the additions are the same however the rows are cut into batches.
            self.total = np.concatenate([self.total[None], rows]).sum(0)
            slots = np.arange(self.seen, self.seen + len(rows))
            late = slots >= len(self._held)
            slots[late] = self._random.random(late.sum()) * (slots[late] + 1)
            kept = slots < len(self._held)
            # Where two rows want one slot, NumPy leaves the later one in it, as if they had come one by one.
            self._held[slots[kept]] = rows[kept]
            self.seen += len(rows)

    def draw(self, count: int) -> np.ndarray:
        """(count, d): some of the rows that are held, each as likely as any other, or a view of all of them."""
        if count == len(self.rows):
            return self.rows
        # The first rows would be no fair sample, because a row's slot still depends on when it came.
        random = np.random.default_rng([*self.seed, count])
        return self.rows[np.sort(random.choice(len(self.rows), count, replace=False))]
