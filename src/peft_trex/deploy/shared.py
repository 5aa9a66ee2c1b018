"""Moments of the layers' inputs, once for the layers that read the same tensor, within a bound of memory.

Axis legend: N tokens, D_in a layer's input width, r_b the width of the mixed features m, S sets of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .moments import add_products

Readers = tuple[str, ...]


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


class InputSums:
    """Sums of x x^T by the layers that read the same x one after the other, as q, k and v do.

    A layer's own sum is that over all groups that it is in. So it is also exact where layers read the same tensor in
    one forward and different ones in the next.

    Attributes:
        groups: the layers' names, and the float64 sum (S, D_in, D_in) of each group; None where `sets` is 0, which
            counts nothing and only finds the groups.
    """

    def __init__(self, sets: int) -> None:
        self._sets = sets
        self._last: _Read | None = None
        self.groups: dict[Readers, Tensor | None] = {}

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
        readers, width = tuple(last.readers), last.rows.shape[1]
        if readers not in self.groups:
            shape, device = (self._sets, width, width), last.rows.device
            self.groups[readers] = torch.zeros(shape, dtype=torch.float64, device=device) if self._sets else None
        total = self.groups[readers]
        if total is not None:
            add_products(total, last.rows, last.rows, last.sets)

    def of(self, name: str) -> Tensor | None:
        """The sum (S, D_in, D_in) of a layer's inputs; None if it has read none."""
        totals: list[Any] = [total for readers, total in self.groups.items() if name in readers]
        return sum(totals[1:], start=totals[0]) if totals else None


class Shared(NamedTuple):
    """Layers that have inputs in common, and the bytes that the moments of these inputs take."""

    names: list[str]
    size: int


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
        squares = sum(layers[readers[0]].in_features ** 2 for readers in part)
        mixed = sum(layers[name].in_features * layers[name].trex_B[adapter_name].shape[1] for name in names)
        found.append(Shared(names, 8 * sets * (squares + mixed)))
    order = {name: place for place, name in enumerate(layers)}
    return sorted(found, key=lambda shared: order[shared.names[0]])


def fill(shared: Iterable[Shared], most: int) -> list[list[str]]:
    """The layers in groups whose moments can be held at once, in at most so many bytes or a single one's."""
    groups: list[list[str]] = [[]]
    held = 0
    for names, size in shared:
        held += size
        if groups[-1] and held > most:
            groups.append([])
            held = size
        groups[-1].extend(names)
    return groups


def fitting(layers: Mapping[str, Any], shared: Iterable[Shared], most: int) -> set[str]:
    """The layers whose moments fit into so many bytes together, those of narrow inputs first."""
    chosen: set[str] = set()
    for names, size in sorted(shared, key=lambda each: layers[each.names[0]].in_features):
        if size <= most:
            most -= size
            chosen.update(names)
    return chosen
