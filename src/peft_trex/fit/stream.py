"""A stream of training data, which is read before the training and must begin anew for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..data_pass import Data, Reading
from ..undo import Undone

ADVICE = (
    "Let each __iter__ of the data set begin anew (datasets.IterableDataset.from_generator does), or fit the prior "
    "before the training, by initialize_trex_prior on other batches of the same kind, which leaves the callback "
    "nothing to do."
)


def is_stream(loader: Any) -> bool:
    """Whether a data loader has no length, or reads a data set that can only be iterated."""
    try:
        len(loader)
    except TypeError:
        return True
    return isinstance(getattr(loader, "dataset", None), IterableDataset)


class Stream:
    """A stream of batches, which remembers its first batch and how many were read."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._first: Any = None
        self._read = 0

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._loader):
            if self._read == 0:
                self._first = deepcopy(batch)
            self._read = max(self._read, number + 1)
            yield batch

    def check_begins_anew(self) -> None:
        """Read a first batch once more, and say so where the stream did not begin anew.

        Raises:
            ValueError: if nothing more comes.
        """
        name = type(getattr(self._loader, "dataset", self._loader)).__name__
        again, cause = [], None
        try:
            # The random states are the same as in the fit, so that rows which are drawn by chance come again.
            reading = Reading(Data(self._loader, max_batches=1))
            with Undone(reading), reading as batches:
                again = list(batches)
        except Exception as error:
            # Accelerate's loaders raise where a stream gives nothing.
            cause = error
        if not again:
            raise ValueError(
                f"The training data, a {name}, can be read only once: the fit of the prior has read {self._read} "
                f"batches, and nothing is left to train on. {ADVICE}"
            ) from cause
        if not _equal(self._first, again[0]):
            warnings.warn(
                f"The training data, a {name}, gave other rows when it was read again after the fit of the prior. "
                f"If it goes on where it was left, the training does not see the first {self._read + 1} batches. "
                f"{ADVICE}",
                stacklevel=2,
            )


def _equal(first: Any, second: Any) -> bool:
    """Whether two batches hold the same."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second.to(first.device))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    same = first == second
    # Arrays of other kinds compare element by element, and are taken for equal.
    return same if isinstance(same, bool) else True
