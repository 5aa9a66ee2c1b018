"""Layers whose input has the tokens first, (T, B, D): XLNet, Longformer, LED and FSMT turn their rows round inside.

Axis legend: B rows of a batch, T tokens.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..source import code_of_forward

TURNED = re.compile(r"\b(hidden_states|inputs_embeds|input_ids|x) = \1\.(?:transpose\(0, 1\)|permute\(1, 0, 2\))")


def turns_rows(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class of modules turns rows and tokens round; the source tells it."""
    return TURNED.search(code_of_forward(kind)) is not None


class Order:
    """Whether the inputs of one layer, within a module that turns them round, have their rows or their tokens first.

    Shapes tell it where a batch has not as many rows as tokens. A layer is the same in all its calls, so what one call
    told holds for the next.
    """

    def __init__(self) -> None:
        self.tokens_first: bool | None = None

    def is_turned(self, x: Tensor, rows: int) -> bool:
        """Whether an input `x` of a forward with so many rows is (T, B, D).

        Raises:
            ValueError: if neither this shape nor a former one tells it.
        """
        if x.dim() != 3 or rows == 1:
            return False
        first, second = x.shape[0] == rows, x.shape[1] == rows
        if first != second:
            self.tokens_first = second
        elif first and self.tokens_first is None:
            raise ValueError(
                f"A T-REX layer got an input of shape {tuple(x.shape)}, in a model that puts the tokens first inside. "
                "With as many rows as tokens, nothing tells which axis is which: change the batch's size, or pad it."
            )
        return second and bool(self.tokens_first)
