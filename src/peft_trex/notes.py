"""What only a user or a trainer knows of an adapter, for its model card."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .model import find_tuner


def describe_trex(
    model: nn.Module,
    *,
    adapter_name: str = "default",
    tasks: Sequence[str] | None = None,
    learning_rate: float | None = None,
) -> None:
    """Say what an adapter was trained on and how, for the model card that is written when it is saved.

    The card tells its sizes, its clusters and what a calibration found by itself. [`TRexPriorCallback`] notes the
    learning rate. The notes stay with the model in memory, and are not loaded with an adapter.

    Args:
        model: a model with a T-REX adapter.
        adapter_name: the adapter.
        tasks: the names of the tasks, in the order in which the card names them; None leaves them as they are.
        learning_rate: the peak learning rate; None leaves it as it is.

    Raises:
        ValueError, TypeError: if there is no such adapter, or the values are of another kind.
    """
    tuner = find_tuner(model)
    tuner.config_of(adapter_name)
    if tasks is not None and (isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks)):
        raise TypeError(f"tasks={tasks!r} must be a list of names.")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate={learning_rate!r} must be a positive, finite number.")
    given = {"tasks": None if tasks is None else list(tasks), "learning_rate": learning_rate}
    notes = tuner.card_notes.setdefault(adapter_name, {})
    notes.update({name: value for name, value in given.items() if value is not None})
