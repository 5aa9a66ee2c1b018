"""Whether the training prompts are chats by the tokenizer's template, so that their messages can be told."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import TRexConfig
from ..model import TRexModel
from ..prior.chat import ChatMarkers, find_markers
from ..prior.inputs import Inputs
from .external import as_mapping
from .ranks import Ranks

logger = logging.getLogger(__name__)
# So many rows, of all processes together, are looked at before it is decided, or all of fewer.
LEAST_ROWS = 32


class Counts(NamedTuple):
    """How many rows a process has looked at, and how many of them hold a user's message."""

    rows: int = 0
    messages: int = 0


class MarkerSearch:
    """Holds the first batches back until it is decided whether their rows are told by chat markers.

    Args:
        markers: those of the tokenizer's template; None where there is nothing to decide.
        tokenizer: for batches that are rows with a `prompt`.
    """

    def __init__(self, markers: ChatMarkers | None, tokenizer: Any = None) -> None:
        self.markers = markers
        self.tokenizer = tokenizer
        self.settled = markers is None
        self.counts = Counts()
        self._held: list[tuple[int, Any]] = []

    def hold(self, number: int, batch: Any) -> None:
        """Count the rows of a batch, and keep it for later."""
        batch = as_mapping(batch, self.tokenizer)
        self._held.append((number, batch))
        rows, messages = self.counts
        inputs = Inputs.of(batch)
        if self.markers is not None and isinstance(inputs.ids, Tensor) and inputs.ids.dim() == 2:
            messages += count_messages(inputs.ids, self.markers)
        self.counts = Counts(rows + inputs.rows, messages)

    def settle(self, counts: Sequence[Counts], ended: bool) -> bool:
        """Decide by the counts of all processes; False if they are too few yet and more data is to come."""
        rows, messages = (sum(column) for column in zip(*counts, strict=True))
        if rows < LEAST_ROWS and not ended:
            return False
        # Data that is no chat may hold a marker here and there.
        if 2 * messages <= rows:
            self.markers = None
        self.settled = True
        return True

    def release(self) -> list[tuple[int, Any]]:
        """The batches that were held back, by their numbers."""
        held, self._held = self._held, []
        return held


def count_messages(ids: Tensor, markers: ChatMarkers) -> int:
    """The number of rows of ids (B, T) that hold a user's message."""
    rows, length = ids.shape
    first = torch.arange(rows, device=ids.device).repeat_interleave(length) * length
    return int(markers.find(ids, first).inside.view(rows, length).any(1).sum()) if length else 0


def search_template(
    tuner: TRexModel, config: TRexConfig, tokenizer: Any, ranks: Ranks
) -> tuple[ChatMarkers | None, str | None]:
    """The chat markers of a tokenizer's template, for an adapter that may get some, and a remark on them.

    Where they cannot be found in the template, the first process says so.
    """
    markers, remark = None, None
    wanted = config.chat_markers is None and config.prior_encoder == "input_embeddings"
    if wanted and tuner.prompts.adapters.is_causal() and getattr(tokenizer, "chat_template", None):
        try:
            markers, remark = find_markers(tokenizer)
        except ValueError as error:
            if ranks.rank == 0:
                logger.warning(
                    "The prior is fitted without chat markers, so that it does not tell a user's message from what is "
                    "around it. They cannot be found in the tokenizer's chat template: %s",
                    error,
                )
    # All ranks must go the same way.
    return ranks.agree(markers), remark


def report_markers(adapter_name: str, remark: str | None) -> None:
    """Say that markers are used, and what is to be known of them."""
    logger.info(
        "The training prompts follow the tokenizer's chat template, so the prior of the adapter %r is that of a "
        "user's message alone; TRexConfig(chat_markers=False) switches this off.",
        adapter_name,
    )
    if remark is not None:
        logger.warning(remark)
