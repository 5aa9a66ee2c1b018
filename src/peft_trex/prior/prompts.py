"""Which tokens of a batch are prompts, and the means over them.

Axis legend: B rows of a batch, T tokens, P prompts (one a row, or several in a row that packs them), d width of the
embedding, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Where the prompts of a batch are.

    Attributes:
        mask: (B, T) bool, whether a token belongs to a prompt.
        index: (B, T), the number of the prompt that goes with each token where a row holds several; else None.
        count: P, or more: numbers that no token has belong to prompts without tokens.
        told: () bool, whether the labels tell every prompt from its answer; None where there are no labels.
    """

    mask: Tensor
    index: Tensor | None
    count: int
    told: Tensor | None

    def with_count(self, count: int) -> Prompts:
        """The same prompts, of which the caller knows how many there are."""
        return replace(self, count=count)

    @property
    def known(self) -> Tensor:
        """(P,) bool, whether a prompt has any token."""
        return self.mask.any(-1) if self.index is None else _per_prompt(self.mask, self.index, self.count) > 0

    def mean(self, embeddings: Tensor) -> Tensor:
        """Mean (P, d), float32, of the token embeddings (B, T, d) of each prompt; zero for one without tokens."""
        picked = embeddings.float().masked_fill(~self.mask[..., None], 0.0)
        if self.index is None:
            total, tokens = picked.sum(1), self.mask.sum(1).float()
        else:
            total = picked.new_zeros(self.count, picked.shape[-1])
            total.index_add_(0, self.index.flatten(), picked.flatten(0, 1))
            tokens = _per_prompt(self.mask, self.index, self.count)
        return total / tokens[:, None].clamp(min=1)

    def spread(self, scores: Tensor) -> Tensor:
        """Scores (P, K) of the prompts as the layers take them: (B, K), or (B, T, K) where a row holds several."""
        return scores if self.index is None else scores[self.index.to(scores.device)]


def find_prompts(
    tokens: Tensor,
    attention_mask: Any = None,
    labels: Any = None,
    position_ids: Any = None,
    completion_mask: Any = None,
) -> Prompts:
    """Find the prompts among the tokens (B, T) of a forward: those attended to, up to the first that is predicted.

    Args:
        tokens: (B, T), of which only the shape and the device count.
        attention_mask: (B, T), or longer by what a cache holds; zero where there is only padding.
        labels: (B, T), -100 where nothing is predicted. A prompt that they leave without a token counts whole.
        position_ids: (B, T) or (1, T), or (4, B, T) where multimodal models put theirs behind the text's. Positions
            that start anew say that a row packs several sequences. The label of a sequence's first token is then
            always -100, and tells nothing; a sequence of one token only fills a row up.
        completion_mask: (B, T), where there are no labels: zero where nothing is predicted.

    Raises:
        TypeError, ValueError: for tokens or masks of other axes.
    """
    if tokens.dim() != 2:
        raise ValueError(f"The input has the axes {tuple(tokens.shape)}; T-REX finds prompts in (B, T) tokens only.")
    attended = _attended(tokens, attention_mask)
    index, count = _packed(attended, position_ids, masked=attention_mask is not None)
    if index is not None and attention_mask is None and tokens.shape[1] > 1:
        attended = (_per_prompt(attended, index, count) > 1)[index]
    # A prompt with fewer tokens than this is not told from its answer.
    least = 1
    if labels is not None and labels.shape == tokens.shape:
        predicted = attended & (labels.to(tokens.device) != -100)
        least = 1 if position_ids is None or attention_mask is not None else 2
    elif labels is None and completion_mask is not None:
        predicted = attended & (_check_completion(completion_mask, tokens).to(tokens.device) != 0)
    else:
        return Prompts(attended, index, count, None)
    if index is None:
        prompt = attended & (predicted.cumsum(1) == 0)
        told = prompt.sum(1, keepdim=True) >= least
    else:
        answered = _per_prompt(predicted, index, count)
        before = answered.cumsum(0) - answered
        prompt = attended & (predicted.flatten().cumsum(0).reshape(tokens.shape) == before[index])
        told = (_per_prompt(prompt, index, count) >= least)[index]
    return Prompts(torch.where(told, prompt, attended), index, count, (told | ~attended).all())


def _check_completion(completion_mask: Any, tokens: Tensor) -> Tensor:
    wanted = f"expected a tensor of shape (B, T) = {tuple(tokens.shape)}, as input_ids, one where tokens are predicted"
    if not isinstance(completion_mask, Tensor):
        raise TypeError(f"completion_mask is a {type(completion_mask).__name__}; {wanted}.")
    if completion_mask.shape != tokens.shape:
        raise ValueError(f"completion_mask has shape {tuple(completion_mask.shape)}; {wanted}.")
    return completion_mask


def _attended(tokens: Tensor, attention_mask: Any) -> Tensor:
    rows, length = tokens.shape
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
    # A longer mask covers a cache too.
    return attention_mask[:, -length:].to(tokens.device) > 0


def _packed(attended: Tensor, position_ids: Any, masked: bool) -> tuple[Tensor | None, int]:
    """The number of the sequence that each token belongs to, (B, T), or None if no row holds two; and how many."""
    rows, length = attended.shape
    if isinstance(position_ids, Tensor) and position_ids.dim() == 3 and len(position_ids) == 4:
        position_ids = position_ids[0]
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in ((rows, length), (1, length)):
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


def _per_prompt(mask: Tensor, index: Tensor, count: int) -> Tensor:
    """Number (P,) of each prompt's tokens that `mask` (B, T) selects, float32."""
    total = torch.zeros(count, device=mask.device)
    return total.index_add_(0, index.flatten(), mask.flatten().float())
