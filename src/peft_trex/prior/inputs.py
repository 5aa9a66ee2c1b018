"""The arguments of a call, parsed once, whatever names transformers has for them.

Axis legend: B rows of a batch, T tokens, d width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .chat import ChatMarkers
from .history import Content
from .prompts import Prompts, find_answered, find_attended, find_prompts, strip_padding

EMBEDS = "semantic_embeds"
SEMANTIC_PRIOR = "semantic_prior"
COMPLETION = "completion_mask"
# What transformers calls the cache, among a forward's arguments and in its output: the first name since 5.24, where
# the next two are deprecated. The others are lists of states, of RWKV and Reformer.
CACHES = ("cache", "past_key_values", "cache_params", "state", "past_buckets_states")
# Arguments that say where sequences begin in a packed row, beside position_ids.
BOUNDARIES = ("cu_seq_lens_q", "seq_idx")
# Arguments whose first axes are the rows and the tokens of a call, the ones that its layers see first.
ROWS = ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids", "labels")


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward, a generate call or a batch of data, by what they are.

    A batch of choices (B, C, T) is parsed as B * C rows.

    Attributes:
        ids: (B, T) token ids.
        embeds: (B, T, d), the tokens' embeddings, which may come in the place of `ids`.
        mask: (B, T), or longer by what a cache holds; zero where there is only padding.
        positions: (B, T) or (1, T), which start anew where a row packs several sequences.
        labels: (B, T), -100 where nothing is predicted.
        completion_mask: (B, T), zero where nothing is predicted; it counts before the labels.
        shift_labels: (B, T), labels that stand at the token before already.
        items: number of labelled tokens in all batches of a step.
        caches: the key-value caches that the call goes on from.
        encoded: an encoder's output, which may come in the place of its run.
        decoder_mask, decoder_ids: of the decoder of an encoder-decoder model.
        rows: B, also of models without tokens.
        lengths: T of each argument that has rows and tokens.
        given: the names of all arguments that are not None.
    """

    ids: Any = None
    embeds: Any = None
    mask: Any = None
    positions: Any = None
    labels: Any = None
    completion_mask: Any = None
    shift_labels: Any = None
    items: Any = None
    caches: tuple[Any, ...] = ()
    encoded: Any = None
    decoder_mask: Any = None
    decoder_ids: Any = None
    rows: int = 1
    lengths: tuple[int, ...] = ()
    given: tuple[str, ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Inputs:
        """Parse arguments by their names."""
        arguments = {name: _as_rows(name, value) for name, value in arguments.items()}
        tensors = [value for value in arguments.values() if isinstance(value, Tensor) and value.dim() > 0]
        known = [value for name in ROWS if isinstance(value := arguments.get(name), Tensor) and value.dim() > 0]
        sized = known or tensors[:1]
        return cls(
            ids=arguments.get("input_ids"),
            embeds=arguments.get("inputs_embeds"),
            mask=arguments.get("attention_mask"),
            positions=arguments.get("position_ids"),
            labels=arguments.get("labels"),
            completion_mask=arguments.get(COMPLETION),
            shift_labels=arguments.get("shift_labels"),
            items=arguments.get("num_items_in_batch"),
            caches=tuple(caches_in(arguments)),
            encoded=arguments.get("encoder_outputs"),
            decoder_mask=arguments.get("decoder_attention_mask"),
            decoder_ids=arguments.get("decoder_input_ids"),
            rows=sized[0].shape[0] if sized else 1,
            lengths=tuple(value.shape[1] for value in sized if value.dim() > 1),
            given=tuple(sorted(name for name, value in arguments.items() if value is not None)),
        )

    @property
    def tokens(self) -> Any:
        """(B, T), of which only the shape and the device count; None without tokens."""
        return self.embeds[..., 0] if self.ids is None and isinstance(self.embeds, Tensor) else self.ids

    def check_packing(self) -> None:
        """Raise a ValueError if rows are packed in a way that does not say where a sequence begins in each row."""
        if self.positions is None and any(name in self.given for name in BOUNDARIES):
            raise ValueError(
                f"The rows are packed by {' or '.join(BOUNDARIES)} alone; T-REX finds the sequences by position_ids "
                "that start anew. DataCollatorWithFlattening gives them with return_position_ids=True."
            )

    def prompts(self, causal: bool = True, markers: ChatMarkers | None = None, prefix: bool = False) -> Prompts:
        """Where the prompts are; labels, a completion mask and markers tell it in causal language models only."""
        if not causal:
            return find_prompts(self.tokens, self.mask, position_ids=self.positions)
        markers = markers if self.ids is not None else None
        told_by = (self.labels, self.positions, self.completion_mask)
        return find_prompts(self.tokens, self.mask, *told_by, markers=markers, prefix=prefix and not self.told)

    @property
    def in_rows(self) -> bool:
        """Whether there are tokens, and a mask of other axes than theirs does not hide which of them are padding."""
        tokens = self.tokens
        plain = self.mask is None or (isinstance(self.mask, Tensor) and self.mask.dim() == 2)
        return plain and isinstance(tokens, Tensor) and tokens.dim() == 2

    def content(self, causal: bool = True) -> Content | None:
        """The tokens of this call; None without any, or with axes in which there are no rows of tokens."""
        piece = self.embeds if self.ids is None else self.ids
        if not self.in_rows:
            return None
        answered = find_answered(self.tokens, self.labels, self.completion_mask) if causal else None
        return Content((piece,), find_attended(self.tokens, self.mask), answered)

    @property
    def told(self) -> bool:
        """Whether the caller says which tokens are predicted."""
        return self.labels is not None or self.completion_mask is not None

    def without_padding(self, pad: Any) -> Inputs:
        """The same with a mask, where there is none: runs of the pad token at the ends of a row are padding."""
        found = self.mask is not None or self.positions is not None or not isinstance(pad, int)
        if found or not isinstance(self.ids, Tensor) or self.ids.dim() != 2:
            return self
        return replace(self, mask=strip_padding(self.ids, pad))

    def share_of_loss(self, shifted: bool) -> Tensor | float:
        """A forward's share, in (0, 1], of the tokens that its loss is normalised by; 1 if their number is unknown.

        transformers' Trainer gives the number of labelled tokens of all batches of a step as `num_items_in_batch`.
        The model divides its loss by that number and the Trainer by nothing, so a mean must be weighed alike. With
        `shifted` the model predicts the label after each token, so that a row's first label does not count.
        """
        labels = self.labels
        if self.shift_labels is not None:
            labels, shifted = self.shift_labels, False
        if self.items is None or labels is None:
            return 1.0
        return (labels[..., 1:] if shifted else labels).ne(-100).sum() / self.items

    def packed_prompts(self, values: int) -> Prompts | None:
        """Where the prompts are, for which so many values were given, if rows hold several; None otherwise."""
        if self.positions is None or not self.in_rows:
            return None
        prompts = self.prompts(causal=False)
        if prompts.sequence is not None and torch.compiler.is_compiling():  # a compiled forward cannot count
            return None if values == self.rows else replace(prompts, sequences=values)
        return None if prompts.sequence is None else prompts


def _as_rows(name: str, value: Any) -> Any:
    """An argument with the choices (B, C, ...) of multiple choice as rows."""
    axes = {"input_ids": 3, "inputs_embeds": 4, "attention_mask": 3}.get(name)
    return value.flatten(0, 1) if axes and isinstance(value, Tensor) and value.dim() == axes else value


def caches_in(values: Any) -> list[Any]:
    """The caches among a forward's arguments or in its output, where a tuple does not name them."""
    if isinstance(values, tuple):
        return [value for value in values if hasattr(value, "get_seq_length")]
    # An output warns about the old names where it is asked for them, so it is not asked but read.
    named = values if isinstance(values, Mapping) else getattr(values, "__dict__", {})
    found = [value for name, value in named.items() if name in CACHES]
    return [value for value in found if value is not None and not isinstance(value, Tensor)]
