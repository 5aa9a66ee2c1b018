"""One adapter for each row of a batch: PEFT's `adapter_names`.

Axis legend: B rows that the caller gave, N rows of a call (B, or more where beams or returned sequences stand beside
each other), T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..undo import Snapshot, Undone
from .state import ForwardState

# PEFT's name for a row that runs without any adapter.
BASE = "__base__"


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of the rows of a batch.

    Attributes:
        names: of each row, (B).
        repeated: whether each row may stand several times beside itself, as in a generate call.
    """

    names: tuple[str, ...]
    repeated: bool = False

    @classmethod
    def of(cls, names: Any, known: Iterable[str]) -> RowAdapters:
        """Those that a caller gave; a TypeError or a ValueError if they are no names of these adapters."""
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names={names!r} must be a list of names, one for each row.")
        unknown = sorted({*names} - {BASE, *known})
        if unknown or not names:
            raise ValueError(
                f"adapter_names holds {', '.join(unknown) or 'nothing'}; expected for each row one of the T-REX "
                f"adapters {sorted(known)}, or {BASE!r} for none."
            )
        return cls(tuple(names))

    @property
    def adapters(self) -> list[str]:
        """The adapters of any rows."""
        return [name for name in dict.fromkeys(self.names) if name != BASE]

    def for_generate(self, rows: int) -> RowAdapters:
        """The same for a generate call of so many rows."""
        self.check(rows)
        return replace(self, repeated=True)

    def check(self, rows: int) -> None:
        """Raise a ValueError if a call has another number of rows."""
        if rows % len(self.names) if self.repeated else rows != len(self.names):
            raise ValueError(f"adapter_names has {len(self.names)} names for {rows} rows; give one for each row.")

    def expanded(self, rows: int) -> list[str]:
        """The name of each row of a call, (N)."""
        self.check(rows)
        return [name for name in self.names for _ in range(rows // len(self.names))]

    def parts(self, state: ForwardState, x: Tensor, axis: int) -> Iterator[tuple[str, Tensor, ForwardState]]:
        """For each adapter: its places along an axis of a layer's input, and what its rows alone carry.

        Args:
            state: of the forward that runs.
            x: the input, with the rows on this axis, or all rows' tokens one after the other (N * T, D_in).
            axis: 0 or 1.
        """
        count, rows = x.shape[axis], state.rows
        flat = x.dim() == 2 and any(count == rows * length for length in state.lengths)
        if count != rows and not flat:
            raise ValueError(
                f"A T-REX layer got an input of shape {tuple(x.shape)} in a forward of {rows} rows, so adapter_names "
                "cannot tell which adapter it belongs to. Leave such modules out with exclude_modules, or run the "
                "adapters one after the other with set_adapter."
            )
        names = self.expanded(rows)
        for adapter in self.adapters:
            chosen = torch.tensor([row for row, name in enumerate(names) if name == adapter], device=x.device)
            score = state.scores.get(adapter)
            if score is not None and len(score) == rows:
                score = score.index_select(0, chosen.to(score.device))
            places = chosen
            if count != rows:
                places = (chosen[:, None] * (count // rows) + torch.arange(count // rows, device=x.device)).flatten()
            yield adapter, places, ForwardState({adapter: score}, len(chosen), state.lengths)


@contextmanager
def running_by_row(running: Any, rows: RowAdapters, base: nn.Module) -> Iterator[None]:
    """Within this block, calls of a base model run each row with the adapter that is named for it.

    Args:
        running: what runs now, as the channel of the model's layers knows it.
        rows: the adapters of the rows.
        base: the base model.
    """
    # Modules that are trained in full beside the adapters have PEFT's own way for this.
    wrappers = [module for module in base.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    with Undone(Snapshot(running)), ExitStack() as hooks:
        for wrapper in wrappers:
            hooks.enter_context(wrapper.register_forward_pre_hook(partial(_name_rows, rows), with_kwargs=True))
        running.rows = rows
        yield
        running.rows = None


def _name_rows(rows: RowAdapters, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Before a module of which PEFT keeps a copy for each adapter: say which of them a row takes."""
    expanded = replace(rows, repeated=True).expanded(len(args[0] if args else next(iter(kwargs.values()))))
    return args, {**kwargs, "adapter_names": expanded}
