"""Reading a user's data loader: some batches of it, with a progress bar, and nothing else changed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm


def check_count(name: str, value: Any, least: int = 1, none: bool = True) -> None:
    """Raise a ValueError unless `value` is a whole number of at least `least`, or None where that is allowed."""
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{', or None' * none}.")


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leaves the global random states of torch (on the CPU), NumPy and Python as they were: a data loader draws."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def reading(dataloader: Iterable[Any], max_batches: int | None, progress: bool, title: str) -> Iterator[Iterable[Any]]:
    """Gives the first `max_batches` batches, all if None; the global random states are left as they were."""
    try:
        total: int | None = len(dataloader)  # type: ignore[arg-type]
    except TypeError:  # a stream, also one in a DataLoader
        total = None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    with random_states_kept(), tqdm(total=total, desc=title, disable=not progress) as bar:

        def batches() -> Iterator[Any]:
            for batch in islice(dataloader, max_batches):
                yield batch
                bar.update()

        yield batches()
