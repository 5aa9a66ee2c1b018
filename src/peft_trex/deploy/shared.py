"""Moments of the layers' inputs, once for the layers that read the same tensor, within a bound of memory.

Axis legend: N tokens, D_in a layer's input width, r_b the width of the mixed features m, S sets of tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .moments import add_products

Readers = tuple[str, ...]
# The numbers of leading directions to choose from: the most that memory has room for.
DIRECTIONS = (256, 128, 64)


class _Read(NamedTuple):
    """An input that a layer has read. The tensor is held, so that no other one can take its place in memory."""

    tensor: Tensor  # (..., D_in)
    version: int
    kept: Tensor  # (...), bool
    rows: Tensor  # (N, D_in), those that are kept
    sets: Tensor  # (N,)
    readers: list[str]

    def is_of(self, tensor: Tensor, kept: Tensor, dtype: torch.dtype) -> bool:
        """Whether this is the very same tensor, unchanged, of which the same tokens are kept."""
        same = self.tensor is tensor and not tensor.is_inference() and self.version == tensor._version
        return same and self.rows.dtype == dtype and torch.equal(self.kept, kept)


class Group(NamedTuple):
    """What is summed up of the inputs that a group of layers reads; None for what is not wanted."""

    total: Tensor | None  # the sum of x x^T, (S, D_in, D_in) float64
    sketch: Tensor | None  # (2 p, D_in) float32, of p directions


class InputSums:
    """Sums over the inputs x by the layers that read the same x one after the other, as q, k and v do.

    A layer's own sum is that over all groups that it is in. So it is also exact where layers read the same tensor in
    one forward and different ones in the next.

    Attributes:
        groups: what is summed up, by the names of the layers.
    """

    def __init__(self, sets: int, wide: Collection[str] = (), directions: int = 0) -> None:
        """Sum up x x^T for groups with a layer of `wide`, and sketches for all where some directions are wanted."""
        self._sets, self._wide, self._directions = sets, set(wide), directions
        self._generator = torch.Generator().manual_seed(0)
        self._last: _Read | None = None
        self.groups: dict[Readers, Group] = {}

    def read(self, name: str, source: Tensor, x: Tensor, kept: Tensor, sets: Tensor) -> Tensor:
        """Note that a layer reads `source`; returns the rows (N, D_in) of it that count.

        Args:
            x: `source` (..., D_in) in the layer's own dtype.
            kept: (...), bool, the tokens that count.
            sets: (N,), the set of each of these.
        """
        if self._last is None or not self._last.is_of(source, kept, x.dtype):
            self.close()
            version = 0 if source.is_inference() else source._version
            self._last = _Read(source, version, kept, x[kept].to(sets.device), sets, [])
        self._last.readers.append(name)
        return self._last.rows

    def close(self) -> None:
        """Count the input that was read last; nothing is held any more."""
        last, self._last = self._last, None
        if last is None:
            return
        readers, rows = tuple(last.readers), last.rows
        count, width = rows.shape
        if readers not in self.groups:
            total = sketch = None
            if self._sets and not self._wide.isdisjoint(readers):
                total = torch.zeros(self._sets, width, width, dtype=torch.float64, device=rows.device)
            if self._directions:
                sketch = torch.zeros(2 * self._directions, width, device=rows.device)
            self.groups[readers] = Group(total, sketch)
        total, sketch = self.groups[readers]
        if total is not None:
            add_products(total, rows, rows, last.sets)
        if sketch is not None:
            # Each token is added to a random row with a random sign, which keeps the sum of x x^T on average.
            places, signs = (torch.randint(most, (count,), generator=self._generator) for most in (len(sketch), 2))
            sketch.index_add_(0, places.to(rows.device), (2 * signs[:, None] - 1).to(rows.device) * rows.float())

    def of(self, name: str) -> Tensor | None:
        """The sum of x x^T (S, D_in, D_in) over a layer's inputs; None if there is none."""
        return _sum(group.total for readers, group in self.groups.items() if name in readers)

    def sketch_of(self, name: str) -> Tensor | None:
        """The sketch (2 p, D_in) of a layer's inputs; None if there is none."""
        return _sum(group.sketch for readers, group in self.groups.items() if name in readers)


def _sum(parts: Iterable[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return sum(tensors[1:], start=tensors[0]) if tensors else None


def leading(sketch: Tensor, A: Tensor) -> Tensor:
    """An orthonormal basis (n, D_in), float64, of A's rows (r_a, D_in) and of about the leading directions of x."""
    sketch, directions = sketch.double(), len(sketch) // 2
    values, vectors = torch.linalg.eigh(sketch @ sketch.T)
    found = vectors[:, -directions:].T @ sketch / values[-directions:].clamp(min=1e-30).sqrt()[:, None]
    return torch.linalg.qr(torch.cat([A.double(), found]).T)[0].T


class Shared(NamedTuple):
    """Layers that have inputs in common, the bytes that the moments of these take, and their widths together."""

    names: list[str]
    size: int
    width: int


def share(layers: Mapping[str, Any], adapter_name: str, groups: Iterable[Readers], sets: int) -> list[Shared]:
    """All layers, by the inputs that they share, in their order. A layer in no group counts as one of its own."""
    parts: list[set[Readers]] = []
    for readers in groups:
        touched = [part for part in parts if any(not set(readers).isdisjoint(other) for other in part)]
        parts = [part for part in parts if part not in touched] + [{readers}.union(*touched)]
    seen = {name for part in parts for readers in part for name in readers}
    parts += [{(name,)} for name in layers if name not in seen]
    found = []
    for part in parts:
        names = [name for name in layers if any(name in readers for readers in part)]
        widths = [layers[readers[0]].in_features for readers in part]
        squares = sum(width**2 for width in widths)
        mixed = sum(layers[name].in_features * layers[name].trex_B[adapter_name].shape[1] for name in names)
        found.append(Shared(names, 8 * sets * (squares + mixed), sum(widths)))
    order = {name: place for place, name in enumerate(layers)}
    return sorted(found, key=lambda shared: order[shared.names[0]])


def fill(shared: Iterable[Shared], most: int) -> list[list[str]]:
    """The layers in groups whose moments can be held at once, in at most so many bytes or a single one's."""
    groups: list[list[str]] = [[]]
    held = 0
    for names, size, _ in shared:
        held += size
        if groups[-1] and held > most:
            groups.append([])
            held = size
        groups[-1].extend(names)
    return groups


def fitting(layers: Mapping[str, Any], shared: Iterable[Shared], most: int) -> set[str]:
    """The layers whose moments fit into so many bytes together, those of narrow inputs first."""
    chosen: set[str] = set()
    for names, size, _ in sorted(shared, key=lambda each: layers[each.names[0]].in_features):
        if size <= most:
            most -= size
            chosen.update(names)
    return chosen


def sketch_size(shared: Iterable[Shared], directions: int) -> int:
    """The bytes of the sketches for so many directions."""
    return 4 * 2 * directions * sum(each.width for each in shared)


def most_directions(
    layers: Mapping[str, Any], adapter_name: str, shared: Sequence[Shared], limits: tuple[int, int]
) -> int:
    """The most leading directions for which sketches, and later bases and moments, have room; 0 where none do.

    Args:
        limits: the number of sets, and the bytes.
    """
    sets, most = limits
    for directions in DIRECTIONS:
        size = 0
        for layer in layers.values():
            n, r_b = directions + len(layer.trex_A[adapter_name]), layer.trex_B[adapter_name].shape[1]
            size += 4 * n * layer.in_features + 8 * sets * n * (n + r_b)
        if max(size, sketch_size(shared, directions)) <= most:
            return directions
    return 0
