"""How large an adapter may be that the configuration in a file asks for.

The header of the tensors is compared with the configuration, but it does not tell how wide the model is, nor what the
file lacks. So what is made is counted before it is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from .fused import shape_of

# So many numbers, or so many times those in the file, are allowed. 2**26 take 256 MB.
LEAST, TIMES = 2**26, 4
NUMBERS = "numbers_in_file"


def note_file(holder: Any, numbers: int) -> None:
    """Have a configuration remember that it comes from a file, which holds so many numbers; 0 if that is not known.

    Where others read the configuration, the model that they load it into remembers it as long as they do.
    """
    setattr(holder, NUMBERS, numbers)


class Room:
    """Counts the numbers of an adapter that is being made; a configuration that was built here may ask for any.

    Args:
        config: the adapter's.
        base: the base model, which limits an adapter whose file is not here yet.
    """

    def __init__(self, config: Any, base: nn.Module) -> None:
        self.held: int | None = getattr(config, NUMBERS, getattr(base, NUMBERS, None))
        known = TIMES * self.held if self.held else sum(math.prod(shape_of(each)) for each in base.parameters())
        self.limit = math.inf if self.held is None else max(LEAST, known)
        self.taken = 0

    def take(self, place: str, shapes: Iterable[tuple[int, ...]]) -> None:
        """Count tensors of these shapes; a ValueError if they are more than the file is good for."""
        self.taken += sum(map(math.prod, shapes))
        if self.taken > self.limit:
            held = f"{self.held} numbers" if self.held else "none that are here"
            raise ValueError(
                f"The configuration in the adapter's file asks for {self.taken} numbers or more in this model, up to "
                f"{place}, where the file holds {held}; expected at most {self.limit}. The file is damaged, hostile, "
                "or another base model's. A new adapter of that size takes a configuration that is built anew: "
                "TRexConfig(**config.to_dict())."
            )
