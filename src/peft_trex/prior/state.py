"""What one forward carries from the model down to its layers: the scores of its prompts, and its router losses.

Axis legend: B rows of a batch, N rows that were given (B, or 1 for all; one for each sequence where rows pack
several), T tokens, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..router_losses import RouterLosses
from .history import Content, Scores, cached_tokens, change_scores, history_of, repeats
from .inputs import SEMANTIC_PRIOR, Inputs
from .prompts import Prompts


@dataclass(frozen=True)
class ForwardState:
    """The state of one forward.

    Attributes:
        scores: for each active adapter (B, K), or (B, T, K) where the tokens of a row differ; None counts as zero.
        rows: B.
        lengths: the numbers of tokens that rows have, by which flattened inputs of layers are recognised.
        losses: what the layers add their router losses to, in training.
    """

    scores: Scores
    rows: int
    lengths: tuple[int, ...] = ()
    losses: RouterLosses | None = None

    def for_call(self, rows: int, lengths: tuple[int, ...]) -> ForwardState:
        """The same prompts for a call of `rows` rows: beams and returned sequences stand beside each other."""
        if rows == self.rows:
            return replace(self, lengths=lengths)
        times = repeats(rows, self.rows)
        return ForwardState(change_scores(self.scores, lambda s: s.repeat_interleave(times, 0)), rows, lengths)


@dataclass(frozen=True)
class Scored:
    """The scores of the tokens of some rows, from their first on.

    Attributes:
        scores: for each adapter (B, K), or (B, T, K) where the tokens of a row differ; None counts as zero.
        last: for each adapter (B, K), those of the turn that is running; None counts as zero.
        begun: whether the answers of all rows have begun, () bool if it is a tensor.
    """

    scores: Scores
    last: Scores
    begun: Tensor | bool = True

    def of_tokens(self, start: int, count: int) -> Scores:
        """The scores of so many tokens from one on; those behind the last go on with the turn that is running."""
        scores: dict[str, Tensor | None] = {}
        for name, score in self.scores.items():
            last = self.last[name]
            if score is not None and score.dim() == 3 and last is not None:
                inside = score[:, start : start + count]
                new = last[:, None].expand(-1, count - inside.shape[1], -1)
                score = torch.cat([inside, new], 1) if inside.shape[1] else last
            scores[name] = score
        return scores


@dataclass
class Generation:
    """A generate call that is running.

    Attributes:
        scored: the scores of the prompts.
        content: the tokens that the scores are of: those of the prompts, behind those of a cache; None without any.
        rows: B.
        cache: what the call's own forwards go on from, once it is known.
        tokens: the number of tokens that its forwards have seen.
    """

    scored: Scored
    content: Content | None
    rows: int
    cache: Any = None
    tokens: int = 0

    def continues(self, inputs: Inputs) -> bool:
        """Whether a forward is part of this call: it goes on from its cache, or repeats its prompt."""
        if self.content is None or torch.compiler.is_compiling():
            return True
        if inputs.caches:
            # The call's own cache carries nothing before the call has ended.
            if self.cache is None and history_of(inputs.caches[0]) is None:
                self.cache = inputs.caches[0]
            return any(cache is self.cache for cache in inputs.caches)
        # An encoder's output that carries a history is of another call.
        return self.begins(inputs) if inputs.encoded is None else history_of(inputs.encoded) is None

    def begins(self, inputs: Inputs) -> bool:
        """Whether rows of tokens begin with those of the prompts."""
        assert self.content is not None
        piece, prompt = inputs.embeds if inputs.ids is None else inputs.ids, self.content.pieces[0]
        if not isinstance(piece, Tensor) or len(self.content.pieces) > 1 or piece.dim() != prompt.dim():
            return False
        rows, width = prompt.shape[:2]
        if len(piece) % rows or piece.shape[1] < width:
            return False
        return torch.equal(piece[:, :width].to(prompt.device), prompt.repeat_interleave(len(piece) // rows, 0))

    def state(self, inputs: Inputs) -> ForwardState:
        """The state of one of its forwards: the scores of the tokens that this is called with."""
        scores, tokens = self.scored.scores, inputs.tokens
        if tokens is not None and any(score is not None and score.dim() == 3 for score in scores.values()):
            scores = self.scored.of_tokens(self._start(inputs, tokens.shape[1]), tokens.shape[1])
        return ForwardState(scores, self.rows)

    def _start(self, inputs: Inputs, count: int) -> int:
        """The number of tokens before those of a forward."""
        assert self.content is not None
        # A compiled graph cannot count; its prompt was run in one piece.
        if torch.compiler.is_compiling():
            return self.content.length if count == 1 else 0
        start = next((cached_tokens(cache) for cache in inputs.caches), 0)
        start = self.tokens if start is None else start
        self.tokens = start + count
        return start


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

    def apply(self, scores: Scores, rows: int, packed: Prompts | None = None) -> dict[str, Tensor | None]:
        """The scores of `rows` rows with the steered ones replaced; `packed` tells where they are in packed rows."""
        expected = rows if packed is None else packed.sequences
        changed = dict(scores)
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
            if packed is not None and len(given) > 1:
                given = packed.spread_sequences(given)
                chosen = None if chosen is None else packed.spread_sequences(chosen)
            elif computed is not None and computed.dim() == 3 and chosen is not None:
                given, chosen = given[:, None], chosen[:, None]
            else:  # each row may become several later, so every row gets scores
                given = given.expand(rows, -1)
            if chosen is not None:
                given = torch.where(
                    chosen[..., None], given, torch.zeros_like(given) if computed is None else computed
                )
            changed[name] = given
        return changed
