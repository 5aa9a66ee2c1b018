"""Chat markers: what stands before and after a user's message in a tokenizer's chat template.

Axis legend: B rows of a batch, T tokens, N = B * T.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, pairwise, product
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Message: TypeAlias = dict[str, Any]
Conversation: TypeAlias = list[Message]
Render: TypeAlias = Callable[..., list[int]]
# Fields of the markers that a configuration may leave out.
MERGED = frozenset({"before_merged", "after_merged"})
# Messages of unlike first and last tokens, one of several lines, none of a marker's words.
USERS = ("Apples grow on trees.", "7 times 8 is", "why?", "(yes) -> no!\n\nsecond line", "Zürich, 東京", "x")
# Some tokenizers merge the whitespace at the edges of these with what a template puts around them.
EDGES = ("\n\nbelow", " indented", "   deep", "\ttab", "line\n", "lines\n\n", "space ", "spaces   ", "\n both \n")
ANSWERS = ("Good.", "56", "because they do\n\nthey do", "é")
SYSTEM = "Be brief."


class Chat(NamedTuple):
    """What markers say of N tokens, all of them (N,) bool.

    Attributes:
        opens: the last token of what stands before a user's message.
        starts: the token after that.
        inside: a user's message.
        answers: from the last token before an answer to the next message.
    """

    opens: Tensor
    starts: Tensor
    inside: Tensor
    answers: Tensor


class ChatMarkers(NamedTuple):
    """Token ids around a user's message.

    Attributes:
        before: what stands before it.
        after: what stands after it.
        assistant: what then stands before the answer, which may be nothing.
        before_merged: the beginning of `before`, for messages whose first whitespace is one token with the rest of
            `before`; that token then counts as the message's. Empty where no tokens merge so.
        after_merged: the end of `after`, in the same way.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    assistant: tuple[int, ...]
    before_merged: tuple[int, ...] = ()
    after_merged: tuple[int, ...] = ()

    @classmethod
    def of(cls, value: Any) -> ChatMarkers | None:
        """The markers of a configuration's value; None where it has none."""
        return cls(**{name: tuple(ids) for name, ids in value.items()}) if value else None

    def as_value(self) -> dict[str, list[int]]:
        """The markers as a configuration keeps them."""
        fields = self._asdict()
        return {name: list(ids) for name, ids in fields.items() if ids or name not in MERGED}

    def find(self, ids: Tensor, first: Tensor) -> Chat:
        """Find the messages in ids (B, T); `first` (N,) is the place where each token's sequence begins."""
        whole = _ends(ids, self.before)
        opens, closes = whole.flatten(), _begins(ids, self.after).flatten()
        if self.before_merged:
            rest = len(self.before) - len(self.before_merged)
            # The beginning of the marker counts where the marker does not go on.
            opens = opens | (_ends(ids, self.before_merged) & ~F.pad(whole, (0, rest))[:, rest:]).flatten()
        if self.after_merged:
            closes = closes | _begins(ids, self.after_merged).flatten()
        headers = _ends(ids, self.assistant or self.after_merged or self.after).flatten()
        places = torch.arange(opens.shape[0], device=ids.device)
        # The last opening before this token, not counted where it lies in another sequence.
        opened = F.pad(_latest(opens, places)[:-1], (1, 0), value=-1)
        open_ = opened >= first
        inside = open_ & (opened > _latest(closes, places))
        header = headers & open_ & ~inside
        return Chat(
            opens=opens,
            starts=F.pad(opens[:-1], (1, 0)) & open_,
            inside=inside,
            answers=open_ & (_latest(header, places) > opened),
        )


def _latest(flags: Tensor, places: Tensor) -> Tensor:
    """(N,), the place of the last flag up to each token, -1 for none."""
    return torch.where(flags, places, -1).cummax(0).values


def _ends(ids: Tensor, marker: Sequence[int]) -> Tensor:
    """(B, T) bool, where the last token of a marker stands."""
    ends = torch.ones_like(ids, dtype=torch.bool)
    for back, token in enumerate(reversed(marker)):
        ends = ends & F.pad(ids == token, (back, 0))[:, : ids.shape[1]]
    return ends


def _begins(ids: Tensor, marker: Sequence[int]) -> Tensor:
    """(B, T) bool, where the first token of a marker stands."""
    return F.pad(_ends(ids, marker), (0, len(marker) - 1))[:, len(marker) - 1 :]


def chat_markers(tokenizer: Any) -> dict[str, list[int]]:
    """Find what stands around a user's message in a tokenizer's chat template, for `TRexConfig(chat_markers=...)`.

    A few made-up conversations are rendered, and what is common to all of them is kept. The result is tried on these
    conversations: the markers must find each message, whole and alone. They are as short as special tokens allow, so
    that an answer that was cut off, say, does not hide the message after it. A message that holds a marker itself is
    taken for several, and what a template writes as a user's message is one: a tool's result, with Qwen's template.

    Args:
        tokenizer: a tokenizer (or a processor with one) that has a chat template.

    Returns:
        Token ids by name: "before" and "after" a user's message, and "assistant" for what then stands before the
        answer, empty if nothing does. Where whitespace at a message's edge can merge with a marker into one token,
        "before_merged" or "after_merged" is what is left of the marker then.

    Raises:
        ValueError: if there is no chat template, it cannot be rendered, or nothing in it tells a user's messages from
            what is around them.

    Warns:
        UserWarning: if the template writes a system prompt into the user's message, so that it is pooled with it.
    """
    markers, remark = find_markers(tokenizer)
    if remark is not None:
        warnings.warn(remark, stacklevel=2)
    return markers.as_value()


def find_markers(tokenizer: Any) -> tuple[ChatMarkers, str | None]:
    """The markers as [`chat_markers`] finds them, and what its user has to know of them, if anything."""
    # A processor holds a tokenizer, and has the template.
    encoder = getattr(tokenizer, "tokenizer", tokenizer)
    render = _renderer(tokenizer, encoder)
    first = [_user(USERS[0]), _assistant(ANSWERS[0])]
    histories: list[Conversation] = [[], first, [*first, _user(USERS[1]), _assistant(ANSWERS[1])]]
    system = [{"role": "system", "content": SYSTEM}]
    try:
        render([*system, _user(USERS[0])])
    except ValueError:
        # Some templates refuse a system prompt.
        return _search(encoder, render, histories), None
    try:
        return _search(encoder, render, [*histories, system]), None
    except ValueError:
        return _search(encoder, render, histories), (
            "The chat template does not tell a system prompt from a user's message, so a system prompt is pooled with "
            "it, and moves the prior of its turn."
        )


def _search(encoder: Any, render: Render, histories: list[Conversation]) -> ChatMarkers:
    """The markers that hold after each of these histories; a ValueError where there are none."""
    befores, afters, closings = _surroundings(render, histories, USERS)
    before, middle = _common_end(befores), _common_start(afters)
    if not before or not middle:
        side = "after" if before else "before"
        raise ValueError(f"The chat template puts nothing {side} a user's message that all conversations share.")
    after = _common_start([middle, *closings])
    merged_befores, merged_afters, _ = _surroundings(render, histories, USERS + EDGES)
    # So many tokens of a marker may merge with a message's edge: those that do so here, and all whitespace.
    head, tail = _whitespace(encoder, before[::-1]), _whitespace(encoder, middle)
    head = max(head, *(len(long) - len(short) for long, short in zip(befores, merged_befores, strict=True)))
    tail = max(tail, *(len(long) - len(short) for long, short in zip(afters, merged_afters, strict=True)))
    # Where a short text alone follows a message, such as a line's end, the message may hold it too.
    lengths = sorted({len(after), len(middle)} - {0})
    starts = _starts(encoder, before)
    for users in (USERS + EDGES, USERS):
        for length, start in product(lengths, starts):
            markers = ChatMarkers(tuple(before[start:]), tuple(middle[:length]), tuple(middle[length:]))
            if users != USERS:
                markers = markers._replace(
                    before_merged=markers.before[:-head] if head else (),
                    after_merged=markers.after[tail:] if tail else (),
                )
            if all(_holds(markers, encoder, render, history, users) for history in histories):
                return markers
    raise ValueError(
        "The tokens that the chat template puts around a user's message do not tell it from what is around it: "
        f"before it {encoder.decode(before)!r}, after it {encoder.decode(middle)!r}."
    )


def _surroundings(
    render: Render, histories: list[Conversation], users: Sequence[str]
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """What all conversations share before a last message of these, after it, and after it where no answer follows.

    Each is a list of token ids for each history; after a message it is that with an answer, and that before one.
    """
    befores, middles, closings, headers = [], [], [], []
    for history in histories:
        asked = [render([*history, _user(text)]) for text in users]
        answered = [
            _common_start(render([*history, _user(text), _assistant(answer)]) for answer in ANSWERS) for text in users
        ]
        befores.append(_common_start(asked))
        closings.append(_common_end(asked))
        middles.append(_common_end(answered))
        headers.append(_common_end(render([*history, _user(text)], True) for text in users))
    return befores, [*middles, *headers], closings


def _whitespace(encoder: Any, ids: list[int]) -> int:
    """The number of tokens at the beginning that are whitespace."""
    return next((place for place, token in enumerate(ids) if encoder.decode([token]).strip()), len(ids))


def _starts(encoder: Any, before: list[int]) -> list[int]:
    """The places where what stands before a message may be cut, the last first: those of special tokens, and 0."""
    special = {*getattr(encoder, "all_special_ids", ()), *getattr(encoder, "added_tokens_decoder", ())}
    return sorted({0} | {place for place, token in enumerate(before) if token in special}, reverse=True)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _renderer(tokenizer: Any, encoder: Any) -> Render:
    """A function from a conversation to its token ids, which raises a ValueError if the template does not take it."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"The {type(tokenizer).__name__} has no chat template, so it has no chat markers.")

    def text_of(conversation: Conversation, answer_next: bool) -> str:
        try:
            return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer_next)
        except Exception as error:
            # A template raises whatever it wants to.
            roles = ", ".join(turn["role"] for turn in conversation)
            raise ValueError(f"The chat template cannot be rendered for the roles {roles}: {error}") from error

    def in_pieces(conversation: Conversation) -> Conversation:
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in conversation]

    def writes(conversation: Conversation) -> bool:
        try:
            return USERS[0] in text_of(conversation, True)
        except ValueError:
            return False

    message = [_user(USERS[0])]
    # Templates of multimodal models read a message's content as a list of pieces.
    pieces = not writes(message) and writes(in_pieces(message))

    def render(conversation: Conversation, answer_next: bool = False) -> list[int]:
        text = text_of(in_pieces(conversation) if pieces else conversation, answer_next)
        return list(encoder(text, add_special_tokens=False)["input_ids"])

    return render


def _holds(markers: ChatMarkers, encoder: Any, render: Render, history: Conversation, users: Sequence[str]) -> bool:
    """Whether the markers find each user's message of some conversations, and where the answer begins."""
    for text, answer in zip(users, cycle(ANSWERS), strict=False):
        asked = render([*history, _user(text)], True)
        for ids in (asked, render([*history, _user(text), _assistant(answer)])):
            row = torch.tensor([ids])
            chat = markers.find(row, torch.zeros(len(ids), dtype=torch.long))
            messages = [
                encoder.decode(
                    row[0, begin:end][chat.inside[begin:end]].tolist(), clean_up_tokenization_spaces=False
                ).strip()
                for begin, end in pairwise([*chat.starts.nonzero().flatten().tolist(), len(ids)])
            ]
            wanted = [turn["content"].strip() for turn in [*history, _user(text)] if turn["role"] == "user"]
            # The last token of what asks for an answer predicts the answer.
            if messages != wanted or (ids is asked and not chat.answers[-1]):
                return False
    return True


def _common_start(rows: Iterable[list[int]]) -> list[int]:
    rows = list(rows)
    length = next(
        (i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows))
    )
    return rows[0][:length]


def _common_end(rows: Iterable[list[int]]) -> list[int]:
    return _common_start(row[::-1] for row in rows)[::-1]


def check_markers(value: Any) -> None:
    """Raise a ValueError unless a configuration's chat markers are None, False or as [`chat_markers`] gives them."""
    if value is None or value is False:
        return
    fields = ChatMarkers._fields
    whole = isinstance(value, Mapping) and set(fields) - MERGED <= set(value) <= set(fields)
    whole = whole and all(
        isinstance(ids, (list, tuple)) and all(type(token) is int and token >= 0 for token in ids)
        for ids in value.values()
    )
    markers = ChatMarkers.of(value) if whole else None
    if (
        markers is None
        or not (markers.before and markers.after)
        or markers.before[: len(markers.before_merged)] != markers.before_merged
        or markers.after[len(markers.after) - len(markers.after_merged) :] != markers.after_merged
    ):
        raise ValueError(
            f"chat_markers={value!r} must be False, None, or a dict of token ids as peft_trex.chat_markers(tokenizer) "
            "gives it: 'before', 'after' and 'assistant', of which only the last may be empty, and perhaps the "
            "beginning of the first as 'before_merged' and the end of the second as 'after_merged'."
        )
