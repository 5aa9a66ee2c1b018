"""What one forward carries from the model down to its layers: the scores of its prompts, and its router losses.

Axis legend: B rows of a batch, N rows that were given (B, or 1 for all; one for each sequence where rows pack
several), T tokens, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..router_losses import RouterLosses
from .inputs import SEMANTIC_PRIOR
from .prompts import Prompts


@dataclass(frozen=True)
class ForwardState:
    """The state of one forward.

    Attributes:
        scores: for each active adapter (B, K), or (B, T, K) where a row holds several prompts; None counts as zero.
        rows: B.
        lengths: the numbers of tokens that rows have, by which flattened inputs of layers are recognised.
        losses: what the layers add their router losses to, in training.
    """

    scores: Mapping[str, Tensor | None]
    rows: int
    lengths: frozenset[int] = field(default=frozenset())
    losses: RouterLosses | None = None

    def for_call(self, rows: int, lengths: frozenset[int]) -> ForwardState:
        """The same prompts for a call of `rows` rows: beams and returned sequences stand beside each other."""
        if rows == self.rows:
            return replace(self, lengths=lengths)
        if rows % self.rows:
            raise ValueError(
                f"The model was called with {rows} rows, but the prior was computed for {self.rows} prompts; expected "
                "a multiple of that (beams, or several sequences for a prompt)."
            )
        times = rows // self.rows
        scores = {
            name: None if score is None else score.repeat_interleave(times, dim=0)
            for name, score in self.scores.items()
        }
        return ForwardState(scores, rows, lengths)

    def kept(self) -> ForwardState:
        """The state of what is generated next: a row that packs several prompts goes on with its last."""
        scores = {
            name: score[:, -1] if score is not None and score.dim() == 3 else score
            for name, score in self.scores.items()
        }
        return ForwardState(scores, self.rows)


@dataclass(frozen=True)
class Override:
    """Scores that are set, and take the place of those computed from the prompts.

    Attributes:
        scores: for each steered adapter, (N, K) float32.
        chosen: for each, which of the rows are steered, (N,) bool; None for all.
    """

    scores: Mapping[str, Tensor]
    chosen: Mapping[str, Tensor | None]

    def covers(self, adapter_name: str) -> bool:
        """Whether no row is left to its own prompt."""
        return adapter_name in self.scores and self.chosen[adapter_name] is None

    @property
    def rows(self) -> int:
        """N, which is 1 if all that was given is for all rows."""
        return max(len(scores) for scores in self.scores.values())

    def apply(self, state: ForwardState, prompts: Prompts | None) -> ForwardState:
        """The state of a forward with the steered rows replaced; `prompts` tells where they are in packed rows."""
        expected = state.rows if prompts is None else prompts.count
        scores = dict(state.scores)
        for name, given in self.scores.items():
            if name not in scores:
                raise ValueError(
                    f"{SEMANTIC_PRIOR} is for the adapter {name!r}, but the active adapters with a prior are "
                    f"{sorted(scores)}."
                )
            computed, chosen = scores[name], self.chosen[name]
            if len(given) not in (1, expected):
                raise ValueError(
                    f"{SEMANTIC_PRIOR} has {len(given)} rows for {expected} prompts; give one for each, or one for "
                    "all."
                )
            if computed is not None:
                given = given.to(computed.device)
                chosen = None if chosen is None else chosen.to(computed.device)
            if prompts is not None and len(given) > 1:
                given, chosen = prompts.spread(given), None if chosen is None else prompts.spread(chosen)
            elif computed is not None and computed.dim() == 3 and chosen is not None:
                given, chosen = given[:, None], chosen[:, None]
            else:  # each row may become several later, so every row gets scores
                given = given.expand(state.rows, -1)
            if chosen is not None:
                given = torch.where(
                    chosen[..., None], given, torch.zeros_like(given) if computed is None else computed
                )
            scores[name] = given
        return replace(state, scores=scores)
