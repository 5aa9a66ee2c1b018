"""What a cache carries of its rows: their tokens, and the prior that these have seen.

A cache's rows are moved, cut and forgotten by methods of the cache. `attach` has them do the same with the history.

Axis legend: B rows, T tokens, d width of the embedding, K clusters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# A key-value cache, or an encoder's output, carries the history of its rows under this name.
HISTORY = "_trex_history"


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
        if self.answered is None and more.answered is None:
            answered = None
        else:
            sides = [
                side.attended.new_zeros(side.attended.shape) if side.answered is None else side.answered
                for side in (self, more)
            ]
            answered = torch.cat(sides, 1)
        present = torch.cat([self.attended, more.attended], 1) if attended is None else attended
        return Content((*self.pieces, *more.pieces), present, answered)

    def change(self, move: Callable[[Tensor], Tensor]) -> Content:
        """The same for other rows, or fewer tokens."""
        whole = (torch.cat(self.pieces, 1),) if self.ids is not None else self.pieces
        answered = None if self.answered is None else move(self.answered)
        return Content(tuple(move(piece) for piece in whole), move(self.attended), answered)

    def cut(self, length: int) -> Content:
        """The first tokens."""
        pieces, left = [], length
        for piece in self.pieces:
            if left > 0:
                pieces.append(piece[:, :left])
                left -= piece.shape[1]
        answered = None if self.answered is None else self.answered[:, :length]
        return Content(tuple(pieces), self.attended[:, :length], answered)


@dataclass(frozen=True)
class History:
    """What the rows of a cache have seen.

    Attributes:
        last: for each adapter (B, K), the prior of the turn that is running; None counts as zero.
        content: the rows' tokens; None where they are not known, as in compiled forwards.
        seen: for each piece of the content, the scores that its tokens had, (B, K) or (B, T_i, K), by adapter.
        begun: whether the answers of all rows have begun, () bool if it is a tensor.
        is_cut: whether more than the end of an answer was taken away, so that another turn may be running than that
            of `last`.
    """

    last: Mapping[str, Tensor | None]
    content: Content | None = None
    seen: tuple[tuple[Mapping[str, Tensor | None], int], ...] = ()
    begun: Tensor | bool = True
    is_cut: bool = False

    @property
    def rows(self) -> int:
        """B, or 1 where no adapter has a prior."""
        return next((len(score) for score in self.last.values() if score is not None), 1)

    def change(self, move: Callable[[Tensor], Tensor]) -> History:
        """The same for other rows."""

        def moved(scores: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
            return {name: None if score is None else move(score) for name, score in scores.items()}

        content = None if self.content is None else self.content.change(move)
        seen = tuple((moved(scores), n) for scores, n in self.seen)
        return replace(self, last=moved(self.last), content=content, seen=seen)

    def cut(self, length: int) -> History | None:
        """The history of the first tokens; None where it is not known."""
        if self.content is None or length > self.content.length:
            return None
        if length == self.content.length:
            return self
        seen = [{name: _in_all(score, n) for name, score in scores.items()} for scores, n in self.seen]
        kept, left = [], length
        for scores, (_, n) in zip(seen, self.seen, strict=True):
            width = min(n, left)
            if width > 0:
                cut = {name: None if score is None else score[:, :width] for name, score in scores.items()}
                kept.append((cut, width))
                left -= width
        # What drafts or tries tokens takes them away again, and the turn that they answered goes on.
        answered, dropped = self.content.answered, ~self.content.attended[:, length:]
        inside = answered is not None and bool((dropped | answered[:, length:]).all())
        return replace(self, content=self.content.cut(length), seen=tuple(kept), is_cut=self.is_cut or not inside)

    def seen_by(self, name: str) -> Tensor | None:
        """(B, T, K), the scores that all tokens had for an adapter; None where they are not known."""
        pieces = [_in_all(scores.get(name), n) for scores, n in self.seen]
        width = next((piece.shape[-1] for piece in pieces if piece is not None), None)
        if width is None or self.content is None:
            return None
        rows = self.content.attended.shape[0]
        device = next(piece.device for piece in pieces if piece is not None)
        return torch.cat(
            [
                torch.zeros(rows, n, width, device=device) if piece is None else piece
                for piece, (_, n) in zip(pieces, self.seen, strict=True)
            ],
            1,
        )


def _in_all(scores: Tensor | None, tokens: int) -> Tensor | None:
    """Scores (B, K) or (B, T, K) of T tokens as (B, T, K)."""
    return scores if scores is None or scores.dim() == 3 else scores[:, None].expand(-1, tokens, -1)


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
    """The number of tokens in a cache; None where there is none, or it does not say."""
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        length = cache.get_seq_length()
    except ValueError:
        # Caches of state-space models have no length.
        return None
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
        assert cache is not None
        history = history_of(cache)
        # What fails half-way must not keep a history that may not fit any more.
        attach(cache, None)
        result = getattr(type(cache), self._name)(cache, *args, **kwargs)
        if history is not None:
            attach(cache, MOVES[self._name](cache, history, (*args, *kwargs.values())))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A cache is copied before what it holds.
        return Move(memo.get(id(self._cache()), self._cache()), self._name)

    def __reduce__(self) -> Any:
        return getattr, (self._cache(), self._name)


def _select(cache: Any, history: History, args: tuple) -> History:
    return history.change(lambda tensor: tensor[torch.as_tensor(args[0]).to(tensor.device)])


def _repeat(cache: Any, history: History, args: tuple) -> History:
    return history.change(lambda tensor: tensor.repeat_interleave(args[0], dim=0))


def _crop(cache: Any, history: History, args: tuple) -> History | None:
    length = cached_tokens(cache)
    return None if length is None else history.cut(length)


MOVES: dict[str, Callable[[Any, History, tuple], History | None]] = {
    "reorder_cache": _select,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "crop": _crop,
    "reset": lambda cache, history, args: None,
}
