"""The arguments of a call, parsed once, whatever names transformers has for them.

Axis legend: B rows of a batch, T tokens, d width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .prompts import Prompts, find_prompts

EMBEDS = "semantic_embeds"
SEMANTIC_PRIOR = "semantic_prior"
COMPLETION = "completion_mask"
# What transformers calls the cache, among a forward's arguments and in its output: the first name since 5.24, where
# the others are deprecated.
CACHES = ("cache", "past_key_values", "cache_params")
# Arguments that say where sequences begin in a packed row, beside position_ids.
BOUNDARIES = ("cu_seq_lens_q", "seq_idx")
# Arguments whose first axes are the rows and the tokens of a call, the ones that its layers see first.
ROWS = ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids", "labels")


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward, a generate call or a batch of data, by what they are.

    Attributes:
        ids: (B, T) token ids.
        embeds: (B, T, d), the tokens' embeddings, which may come in the place of `ids`.
        mask: (B, T), or longer by what a cache holds; zero where there is only padding.
        positions: (B, T) or (1, T), which start anew where a row packs several sequences.
        labels: (B, T), -100 where nothing is predicted.
        completion_mask: (B, T), zero where nothing is predicted; it counts where there are no labels.
        shift_labels: (B, T), labels that stand at the token before already.
        items: number of labelled tokens in all batches of a step.
        caches: the key-value caches that the call goes on from.
        encoded: an encoder's output, which may come in the place of its run.
        decoder_mask, decoder_ids: of the decoder of an encoder-decoder model.
        pixels: images.
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
    pixels: Any = None
    rows: int = 1
    lengths: frozenset[int] = frozenset()
    given: tuple[str, ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Inputs:
        """Parse arguments by their names."""
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
            pixels=arguments.get("pixel_values"),
            rows=sized[0].shape[0] if sized else 1,
            lengths=frozenset(value.shape[1] for value in sized if value.dim() > 1),
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

    def prompts(self, causal: bool = True) -> Prompts:
        """Where the prompts are; labels and a completion mask tell it in causal language models only."""
        labels, completion_mask = (self.labels, self.completion_mask) if causal else (None, None)
        return find_prompts(self.tokens, self.mask, labels, self.positions, completion_mask)

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

    def packed_prompts(self, given: int) -> Prompts | None:
        """Where the prompts are, for which so many values were given, if rows hold several; None otherwise."""
        if self.positions is None or self.tokens is None or (isinstance(self.mask, Tensor) and self.mask.dim() != 2):
            return None
        prompts = self.prompts(causal=False)
        if prompts.index is not None and torch.compiler.is_compiling():  # a compiled forward cannot count
            return None if given == self.rows else prompts.with_count(given)
        return None if prompts.index is None else prompts


def caches_in(values: Any) -> list[Any]:
    """The caches among a forward's arguments or in its output; a tuple does not say where they are."""
    # An output warns about the old names where it is asked for them, so it is not asked but read.
    named = values if isinstance(values, Mapping) else getattr(values, "__dict__", {})
    return [value for name, value in named.items() if name in CACHES and value is not None]


def cached_tokens(cache: Any) -> int | None:
    """The number of tokens in a cache; None where there is none, or it does not say."""
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
