"""Reading a user's data loader: some batches of it, with a progress bar, and nothing else changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from tqdm.auto import tqdm


def check_count(name: str, value: Any, least: int = 1, none: bool = True) -> None:
    """Raise a ValueError unless `value` is a whole number of at least `least`, or None where that is allowed."""
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{', or None' * none}.")


@contextmanager
def reading(dataloader: Iterable[Any], max_batches: int | None, progress: bool, title: str) -> Iterator[Iterable[Any]]:
    """Gives the first `max_batches` batches, all if None; torch's random state is left as it was."""
    try:
        total: int | None = len(dataloader)  # type: ignore[arg-type]
    except TypeError:  # a stream, also one in a DataLoader
        total = None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    with torch.random.fork_rng(devices=[]), tqdm(total=total, desc=title, disable=not progress) as bar:

        def batches() -> Iterator[Any]:
            for batch in islice(dataloader, max_batches):
                yield batch
                bar.update()

        yield batches()
