"""What a cache carries of its rows: their tokens, and the prior that these have seen.

A cache's rows are moved, cut and forgotten by methods of the cache. `attach` has them do the same with the history.

Axis legend: B rows, T tokens, d width of the embedding, K clusters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A key-value cache, or an encoder's output, carries the history of its rows under this name.
HISTORY = "_trex_history"
# The scores of each adapter; None counts as zero.
Scores: TypeAlias = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Content:
    """The tokens of some rows, from their first on.

    Attributes:
        pieces: ids (B, T_i) or embeddings (B, T_i, d), one after the other.
        attended: (B, T) bool, no padding.
        answered: (B, T) bool, the tokens that were predicted; None where nobody said it.
    """

    pieces: tuple[Tensor, ...]
    attended: Tensor
    answered: Tensor | None = None

    @property
    def length(self) -> int:
        """T."""
        return self.attended.shape[1]

    @property
    def ids(self) -> Tensor | None:
        """(B, T), or None where a piece is embeddings."""
        return torch.cat(self.pieces, 1) if all(piece.dim() == 2 for piece in self.pieces) else None

    def with_more(self, more: Content, attended: Tensor | None = None) -> Content:
        """These tokens and then those; `attended` (B, T) may say of all of them which are no padding."""
        answered = None
        if self.answered is not None or more.answered is not None:
            sides = [torch.zeros_like(s.attended) if s.answered is None else s.answered for s in (self, more)]
            answered = torch.cat(sides, 1)
        present = torch.cat([self.attended, more.attended], 1) if attended is None else attended
        return Content((*self.pieces, *more.pieces), present, answered)

    def change(self, move: Callable[[Tensor], Tensor]) -> Content:
        """The same for other rows."""
        whole = (torch.cat(self.pieces, 1),) if self.ids is not None else self.pieces
        answered = None if self.answered is None else move(self.answered)
        return Content(tuple(move(piece) for piece in whole), move(self.attended), answered)

    def cut(self, length: int) -> Content:
        """The first tokens."""
        pieces, start = [], 0
        for piece in self.pieces:
            if start < length:
                pieces.append(piece[:, : length - start])
            start += piece.shape[1]
        answered = None if self.answered is None else self.answered[:, :length]
        return Content(tuple(pieces), self.attended[:, :length], answered)


@dataclass(frozen=True)
class History:
    """What the rows of a cache have seen.

    Attributes:
        last: for each adapter (B, K), the prior of the turn that is running.
        content: the rows' tokens; None where they are not known, as in compiled forwards.
        seen: for each adapter (B, T, K), the scores that the tokens of the content had.
        begun: whether the answers of all rows have begun, () bool if it is a tensor.
        is_cut: whether more than the end of an answer was taken away, so that another turn may be running than that
            of `last`.
    """

    last: Scores
    content: Content | None = None
    seen: Scores | None = None
    begun: Tensor | bool = True
    is_cut: bool = False

    @property
    def rows(self) -> int:
        """B; 1 where neither tokens nor a prior tell it."""
        if self.content is not None:
            return len(self.content.attended)
        return next((len(score) for score in self.last.values() if score is not None), 1)

    def for_rows(self, rows: int) -> History:
        """The same for a call of so many rows: beams and returned sequences stand beside each other."""
        times = repeats(rows, self.rows)
        return self if times == 1 else self.change(lambda tensor: tensor.repeat_interleave(times, 0))

    def change(self, move: Callable[[Tensor], Tensor]) -> History:
        """The same for other rows."""
        content = None if self.content is None else self.content.change(move)
        seen = None if self.seen is None else change_scores(self.seen, move)
        return replace(self, last=change_scores(self.last, move), content=content, seen=seen)

    def cut(self, length: int) -> History | None:
        """The history of the first tokens; None where it is not known."""
        if self.content is None or self.seen is None or length > self.content.length:
            return None
        if length == self.content.length:
            return self
        # What drafts or tries tokens takes them away again, and the turn that they answered goes on.
        answered, dropped = self.content.answered, ~self.content.attended[:, length:]
        inside = answered is not None and bool((dropped | answered[:, length:]).all())
        seen = change_scores(self.seen, lambda scores: scores[:, :length])
        return replace(self, content=self.content.cut(length), seen=seen, is_cut=self.is_cut or not inside)


def change_scores(scores: Scores, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
    """Each adapter's scores, changed where there are any."""
    return {name: None if score is None else change(score) for name, score in scores.items()}


def see_more(seen: Scores | None, scores: Scores, tokens: int) -> Scores:
    """What all tokens have seen, (B, T, K), with so many more of the scores (B, K) or (B, tokens, K).

    It is not known for an adapter that had no scores at first.
    """
    more = change_scores(scores, lambda score: score if score.dim() == 3 else score[:, None].expand(-1, tokens, -1))
    if seen is None:
        return more
    pairs = {name: (seen.get(name), score) for name, score in more.items()}
    return {
        name: None if before is None or after is None else torch.cat([before, after], 1)
        for name, (before, after) in pairs.items()
    }


def repeats(rows: int, prompts: int) -> int:
    """How many rows of a call belong to each prompt; a ValueError if they do not divide evenly."""
    if rows % prompts:
        raise ValueError(
            f"The model was called with {rows} rows, but the prior was computed for {prompts} prompts; expected a "
            "multiple of that (beams, or several sequences for a prompt). Pass semantic_prior for rows that were put "
            "together otherwise, or call generate with one row at a time where it takes rows out of a batch (Whisper)."
        )
    return rows // prompts


def attach(cache: Any, history: History | None) -> None:
    """Have a cache carry a history, or forget the one that it has; a tuple cannot carry anything."""
    if not hasattr(cache, "__dict__"):
        return
    if history is None:
        vars(cache).pop(HISTORY, None)
        return
    setattr(cache, HISTORY, history)
    if torch.compiler.is_compiling():
        return
    for name in MOVES:
        if name not in vars(cache) and callable(getattr(type(cache), name, None)):
            vars(cache)[name] = Move(cache, name)


def history_of(cache: Any) -> History | None:
    """What a cache, or an encoder's output, carries."""
    return getattr(cache, HISTORY, None)


def cached_tokens(cache: Any) -> int | None:
    """The number of tokens in a cache; None where it does not say."""
    # Lists of states, and some caches of state-space models, have no length.
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        length = cache.get_seq_length()
    except ValueError:
        return None if cache.has_previous_state() else 0
    # A static cache's length is a tensor, which a compiled graph cannot look at.
    return None if isinstance(length, Tensor) and torch.compiler.is_compiling() else int(length)


class Move:
    """Stands for a method of a cache: does what the cache's class does, and the same to the history.

    It holds its cache weakly, since a circle would keep the keys and values in memory until Python looks for circles.
    """

    def __init__(self, cache: Any, name: str) -> None:
        self._cache, self._name = weakref.ref(cache), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        if cache is None:
            raise RuntimeError(
                f"{self._name} was called on a shallow copy of a cache that is gone; use copy.deepcopy."
            )
        history = history_of(cache)
        # What fails half-way must not keep a history that may not fit any more.
        attach(cache, None)
        result = getattr(type(cache), self._name)(cache, *args, **kwargs)
        if history is not None:
            attach(cache, MOVES[self._name](cache, history, *args, *kwargs.values()))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A cache is copied before what it holds.
        return Move(memo.get(id(self._cache()), self._cache()), self._name)

    def __reduce__(self) -> Any:
        return getattr, (self._cache(), self._name)


def _select(cache: Any, history: History, rows: Any) -> History:
    return history.change(lambda tensor: tensor[torch.as_tensor(rows).to(tensor.device)])


def _crop(cache: Any, history: History, *_: Any) -> History | None:
    length = cached_tokens(cache)
    return None if length is None else history.cut(length)


MOVES: dict[str, Callable[..., History | None]] = {
    "reorder_cache": _select,
    "batch_select_indices": _select,
    "batch_repeat_interleave": lambda cache, history, n: history.change(lambda tensor: tensor.repeat_interleave(n, 0)),
    "crop": _crop,
    "reset": lambda cache, history: None,
}
