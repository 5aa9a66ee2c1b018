"""Which tokens of a batch are prompts, where their answers begin, and the means over the prompts.

A row holds one or more sequences (packing), and a sequence one or more turns: a prompt and, perhaps, an answer. Each
turn has a prior of its own.

Axis legend: B rows of a batch, T tokens, N = B * T, P turns, d width of the embedding, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .chat import ChatMarkers

# Embeddings are pooled in so many parts, unless there are few of them: a copy of all would be twice as large as a
# batch in bfloat16.
PARTS, SMALL = 32, 2**20


@dataclass(frozen=True)
class Prompts:
    """Where the prompts of a batch are.

    Attributes:
        mask: (B, T) bool, the tokens that are pooled for the prior of their own turn.
        index: (B, T), the number of the turn that each token belongs to where a row holds several; else None.
        count: P, or more: numbers that no token has belong to turns without tokens.
        answers: (B, T) bool, the tokens from the last one of a prompt on, which predict its answer.
        told: () bool, whether labels, a mask or chat markers tell every prompt from its answer; None without any.
        earlier: (B, T) bool, the tokens that are pooled for all later turns of their sequence, too; None for none.
        first: (P,), the number of the first turn in the sequence of each turn; None without `earlier`.
        chat: () bool, whether all sequences hold a user's message between markers; None without markers.
        begun: () bool, whether what follows the last token of each row goes on with an answer; None without markers.
        sequence: (B, T), the number of the packed sequence that each token belongs to; None where rows are not packed.
        sequences: the number of sequences, B where rows are not packed.
    """

    mask: Tensor
    index: Tensor | None
    count: int
    answers: Tensor
    told: Tensor | None
    earlier: Tensor | None = None
    first: Tensor | None = None
    chat: Tensor | None = None
    begun: Tensor | None = None
    sequence: Tensor | None = None
    sequences: int = 0

    def of_last_turns(self) -> Prompts:
        """The prompts of the last turn of each row alone; packed rows keep all."""
        if self.index is None or self.sequence is not None or self.earlier is not None:
            return self
        return replace(self, mask=self.mask & (self.index == self.index[:, -1:]), index=None, count=len(self.mask))

    @property
    def lengths(self) -> Tensor:
        """(P,) float32, the number of pooled tokens of each turn."""
        lengths = self._sum(self.mask[..., None], self.mask)
        if self.earlier is not None:
            lengths = lengths + self._sum_of_earlier(self.earlier[..., None])
        return lengths[:, 0]

    @property
    def known(self) -> Tensor:
        """(P,) bool, whether a turn has any pooled token."""
        return self.lengths > 0

    def mean(self, embeddings: Tensor) -> Tensor:
        """Mean (P, d), float32, of the pooled token embeddings (B, T, d) of each turn; zero for one without tokens."""
        total = self._sum(embeddings, self.mask)
        if self.earlier is not None:
            total = total + self._sum_of_earlier(embeddings)
        return total / self.lengths[:, None].clamp(min=1)

    def spread(self, scores: Tensor) -> Tensor:
        """Values (P, K) of the turns as the layers take them: (B, K), or (B, T, K) where a row holds several."""
        return scores if self.index is None else scores[self.index.to(scores.device)]

    def spread_sequences(self, values: Tensor) -> Tensor:
        """The same for values of the sequences, (sequences, ...)."""
        return values if self.sequence is None else values[self.sequence.to(values.device)]

    def _sum(self, values: Tensor, chosen: Tensor) -> Tensor:
        """The sum (P, D), float32, over the chosen tokens of each turn, of values (B, T, D)."""
        rows, tokens = chosen.shape
        total = torch.zeros(rows if self.index is None else self.count, values.shape[-1], device=values.device)
        parts = [slice(None)]
        # A compiler fuses the steps, and makes no copy at all.
        if not torch.compiler.is_compiling():
            step = max(1, -(-tokens // PARTS), SMALL // max(1, rows * values.shape[-1]))
            parts = [slice(start, start + step) for start in range(0, tokens, step)]
        for part in parts:
            picked = values[:, part].masked_fill(~chosen[:, part, None], 0).float()
            if self.index is None:
                total += picked.sum(1)
            else:
                total.index_add_(0, self.index[:, part].flatten(), picked.flatten(0, 1))
        return total

    def _sum_of_earlier(self, values: Tensor) -> Tensor:
        """The sum over the tokens of all turns of the sequence before each turn."""
        assert self.earlier is not None and self.first is not None
        total = self._sum(values, self.earlier)
        # A sum over many turns of a batch must not round what a single turn has; a compiled or a GPU's batch has one
        # number for each token, where double precision would cost too much.
        wide = total if self.count == self.mask.numel() else total.double()
        before = wide.cumsum(0) - wide
        return (before - before[self.first]).float()


def find_prompts(
    tokens: Tensor,
    attention_mask: Any = None,
    labels: Any = None,
    position_ids: Any = None,
    completion_mask: Any = None,
    markers: ChatMarkers | None = None,
    prefix: bool = False,
) -> Prompts:
    """Find the prompts among the tokens (B, T) of a forward.

    With chat markers, a turn is a user's message and what follows it, and the message alone is pooled. In sequences
    without such a message, each run of predicted tokens is an answer, and all attended tokens before it are pooled,
    earlier answers included.

    Args:
        tokens: (B, T), of which only the shape and the device count, except for markers, which need the ids.
        attention_mask: (B, T), or longer by what a cache holds; zero where there is only padding.
        labels: (B, T), -100 where nothing is predicted. A sequence whose first answer they leave without a prompt
            counts whole.
        position_ids: (B, T) or (1, T), or (4, B, T) where multimodal models put theirs behind the text's. Positions
            that start anew say that a row packs several sequences. The label of a sequence's first token is then
            always -100, and tells nothing; a sequence of one token only fills a row up.
        completion_mask: (B, T), zero where nothing is predicted. Beside it labels say nothing: who trains on the
            prompt's tokens too has labels for them.
        markers: what stands around a user's message.
        prefix: whether the tokens may be the beginning of a chat, whose user's message is still to come.

    Raises:
        TypeError, ValueError: for tokens or masks of other axes.
    """
    if tokens.dim() != 2:
        raise ValueError(f"The input has the axes {tuple(tokens.shape)}; T-REX finds prompts in (B, T) tokens only.")
    attended = find_attended(tokens, attention_mask)
    sequence, sequences = _packed(attended, position_ids, masked=attention_mask is not None)
    if sequence is not None and attention_mask is None and tokens.shape[1] > 1:
        sizes = torch.zeros(sequences, device=tokens.device).index_add_(
            0, sequence.flatten(), attended.flatten().float()
        )
        attended = (sizes > 1)[sequence]
    answered = find_answered(tokens, labels, completion_mask)
    # A prompt with fewer tokens than this is not told from its answer.
    by_labels = completion_mask is None and labels is not None
    least = 2 if by_labels and position_ids is not None and attention_mask is None else 1
    prompts = split_turns(attended, answered, tokens if markers else None, markers, sequence, least, prefix)
    return replace(prompts, sequences=sequences)


def find_answered(tokens: Tensor, labels: Any, completion_mask: Any) -> Tensor | None:
    """(B, T) bool, the tokens that are predicted, by the mask where there is one; None where neither says it."""
    if completion_mask is None:
        told = labels is not None and labels.shape == tokens.shape
        return labels.to(tokens.device) != -100 if told else None
    wanted = f"expected a tensor of shape (B, T) = {tuple(tokens.shape)}, as input_ids, one where tokens are predicted"
    if not isinstance(completion_mask, Tensor):
        raise TypeError(f"completion_mask is a {type(completion_mask).__name__}; {wanted}.")
    if completion_mask.shape != tokens.shape:
        raise ValueError(f"completion_mask has shape {tuple(completion_mask.shape)}; {wanted}.")
    return completion_mask.to(tokens.device) != 0


class _Spans:
    """Consecutive spans of N tokens, each beginning where `starts` (N,) is true."""

    def __init__(self, starts: Tensor) -> None:
        places = torch.arange(starts.shape[0], device=starts.device)
        self.first = torch.where(starts, places, 0).cummax(0).values
        end = places[-1:] + 1
        following = torch.cat([torch.where(starts, places, end)[1:], end])
        self.last = following.flip(0).cummin(0).values.flip(0) - 1

    def so_far(self, flags: Tensor) -> Tensor:
        """(N,), the number of flags (N,) from the span's first token to this one."""
        count = flags.cumsum(0)
        return count - (count - flags.long())[self.first]

    def total(self, flags: Tensor) -> Tensor:
        """(N,), the number of flags in the token's span."""
        count = flags.cumsum(0)
        return count[self.last] - (count - flags.long())[self.first]


def split_turns(
    attended: Tensor,
    answered: Tensor | None,
    ids: Tensor | None = None,
    markers: ChatMarkers | None = None,
    sequence: Tensor | None = None,
    least: int = 1,
    prefix: bool = False,
) -> Prompts:
    """Find the turns among tokens, as [`find_prompts`] says it.

    Args:
        attended: (B, T) bool, no padding.
        answered: (B, T) bool, what is predicted; None where nobody says it.
        ids: (B, T), for the markers.
        markers: what stands around a user's message.
        sequence: (B, T), the number of the packed sequence of each token; None where each row is one.
        least: the tokens that a prompt must have to be told from its answer.
        prefix: whether an answer begins behind a user's message only.
    """
    shape, device = attended.shape, attended.device
    if not attended.numel():
        return Prompts(attended, None, shape[0], attended, None, sequence=sequence, sequences=shape[0])
    numbers = torch.arange(shape[0], device=device)[:, None].expand(shape) if sequence is None else sequence
    numbers, present = numbers.flatten(), attended.flatten()
    anew = F.pad(numbers[1:] != numbers[:-1], (1, 0), value=True)
    sequences = _Spans(anew)

    predicted = torch.zeros_like(present) if answered is None else present & answered.flatten()
    prompt = present & (sequences.so_far(predicted) == 0)
    told = sequences.total(prompt) >= least
    # An answer has ended here, and another one follows in the sequence.
    ended = ~predicted & F.pad(predicted[:-1], (1, 0)) & ~anew
    starts = ended & (sequences.total(predicted) > sequences.so_far(predicted)) & told
    chat = None
    if markers is not None and ids is not None:
        chat = markers.find(ids, sequences.first)
        starts = torch.where(
            sequences.total(chat.opens) > 0, chat.starts & (sequences.so_far(chat.starts) > 1), starts
        )
    starts = starts | anew
    turns = _Spans(starts)
    index = starts.cumsum(0) - 1

    pooled = torch.where(told, present & (turns.so_far(predicted) == 0), present)
    answers = turns.so_far(pooled) == turns.total(pooled)
    is_chat = torch.zeros_like(present)
    if chat is not None:
        is_chat = sequences.total(chat.opens) > 0
        pooled = torch.where(is_chat, chat.inside & present, pooled)
        # An answer begins behind the assistant's header, or earlier where the caller says so, but not in a message.
        said = (turns.total(predicted) > 0) & (turns.total(predicted & pooled) == 0)
        begun = turns.so_far(predicted) + (F.pad(predicted[1:], (0, 1)) & ~F.pad(starts[1:], (0, 1), value=True)) > 0
        answers = torch.where(is_chat, chat.answers | (said & begun), answers & (not prefix))
        told = told & (answered is not None) | is_chat

    # A look at values would break a compiled graph, and wait for a GPU.
    looks = not torch.compiler.is_compiling() and (device.type == "cpu" or sequence is not None)
    single = sequence is None and ((answered is None and chat is None) or (looks and bool((starts == anew).all())))
    # Only turns that predicted tokens have ended begin with the tokens of others.
    alone = single or answered is None or (looks and not bool((starts & ~anew & ~is_chat).any()))
    earlier = None if alone else present & ~is_chat
    count = starts.shape[0]
    if single or looks:
        count = shape[0] if single else int(starts.sum())
    return Prompts(
        mask=pooled.view(shape),
        index=None if single else index.view(shape),
        count=count,
        answers=(answers & present).view(shape),
        told=None if answered is None and chat is None else (told | ~present).all(),
        earlier=None if earlier is None else earlier.view(shape),
        first=None if earlier is None else index.new_zeros(count).scatter(0, index, index[sequences.first]),
        chat=None if chat is None else (is_chat | ~present).all(),
        begun=None if chat is None else (answers & present & ~chat.opens).view(shape)[:, -1].all(),
        sequence=sequence,
        sequences=shape[0],
    )


def strip_padding(ids: Tensor, pad: int) -> Tensor:
    """(B, T) bool: all tokens but the runs of the pad token at both ends of a row."""
    real = ids != pad
    return (real.cumsum(1) > 0) & (real.flip(1).cumsum(1) > 0).flip(1)


def find_attended(tokens: Tensor, attention_mask: Any) -> Tensor:
    """(B, T) bool, the tokens (B, T) that are no padding; a longer mask covers a cache, too."""
    rows, length = tokens.shape[:2]
    if attention_mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=tokens.device)
    if (
        not isinstance(attention_mask, Tensor)
        or attention_mask.dim() != 2
        or attention_mask.shape[0] != rows
        or attention_mask.shape[1] < length
    ):
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask is {shape} for {rows} rows of {length} tokens; to find the prompt, T-REX needs a mask of "
            f"shape (B, T) = {(rows, length)}."
        )
    return attention_mask[:, -length:].to(tokens.device) > 0


def _packed(attended: Tensor, position_ids: Any, masked: bool) -> tuple[Tensor | None, int]:
    """The number of the sequence that each token belongs to, (B, T), or None if no row holds two; and how many."""
    rows, length = attended.shape
    if isinstance(position_ids, Tensor) and position_ids.dim() == 3 and len(position_ids) == 4:
        position_ids = position_ids[0]
    shapes = ((rows, length), (1, length))
    if not attended.numel() or not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in shapes:
        return None, rows
    positions = position_ids.to(attended.device)
    # Beside a mask, the positions of padding may be anything. Without one, a sequence begins wherever transformers
    # cuts the attention.
    if masked:
        anew = positions == 0
    else:
        anew = positions.diff(dim=1, prepend=positions[:, :1]) != 1
    begins = attended & (anew | (attended.cumsum(1) == 1))
    index = (begins.flatten().cumsum(0) - 1).clamp(min=0).reshape(rows, length)
    # A look at the values would break a compiled graph, so the largest number is taken there.
    if torch.compiler.is_compiling():
        return index, rows * length
    if bool((begins.sum(1) <= 1).all()):
        return None, rows
    return index, int(begins.sum())
