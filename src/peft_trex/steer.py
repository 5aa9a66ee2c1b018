"""Steering: a block in which the prior is set instead of computed, which routes a prompt to a chosen skill.

Axis legend: B rows of a batch, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from .model import find_tuner
from .prior.channel import Block
from .prior.hooks import PromptWatch
from .prior.override import find_steerable, resolve


def steer_trex(model: nn.Module, semantic_prior: Any) -> AbstractContextManager[None]:
    """Set the semantic prior of all that the model runs within the block, instead of computing it from the prompts.

        with steer_trex(model, 3):                            # the skill of cluster 3
            model.generate(**inputs)
        model.generate(**inputs, semantic_prior=[3, -1, 5])   # the same for one call, row by row

    Every forward and `generate` takes the same as the argument `semantic_prior`. It goes before a block around it, and
    an inner block before an outer one. What goes on from a cache keeps the prior that its prompt had. Disabled
    adapters take no part; the token router stays as it is.

    Blocks hold for the context that they are entered in, as context variables do: for the coroutine, and for what
    `asyncio.to_thread` starts within. A `threading.Thread` sees those around its start only where Python hands it
    the context (`sys.flags.thread_inherit_context`, from Python 3.14 on), a compiled forward those of its own
    thread, and a generator that yields within a block steers its caller meanwhile; give the call itself
    `semantic_prior` there. A block takes away nothing but itself, in whatever order blocks end.

    Args:
        model: a model with a T-REX adapter.
        semantic_prior: for all rows at once, or row by row (by sequence, where rows pack several):

            - cluster ids in [0, K), an int or whole numbers (B,): the scores are the cosines cos(c_k, c_j) of that
              centroid with all. -1 leaves a row to its own prompt.
            - floats (K,) or (B, K), at least 0: a mixture of the clusters, scored as the sum of the centroids with
              these weights. A row of zeros is left to its own prompt.
            - a mapping, as the forward takes it: example prompts, one or B of them, as `input_ids` with an
              `attention_mask` (what a tokenizer returns), or as `semantic_embeds` (B, prior_dim) for adapters with
              `prior_encoder="external"`. One without tokens, or all zero, leaves its row to its own prompt.
            - a mapping from the names of active adapters to any of these: clusters mean something else to each.

    Raises:
        ValueError, TypeError: if no active adapter has a fitted prior, one is merged, or the value is none of these,
            names unknown clusters or adapters, holds NaN, or has another number of rows than a call. Of several
            adapters with a prior, clusters and mixtures need the name.
    """
    return _Steering(find_tuner(model).prompts, semantic_prior)


class _Steering(AbstractContextManager[None]):
    """A block of `steer_trex`. It is a class for the reason that `Undone` is one."""

    def __init__(self, prompts: PromptWatch, semantic_prior: Any) -> None:
        self._prompts = prompts
        self._semantic_prior = semantic_prior
        self._block: Block | None = None

    def __enter__(self) -> None:
        prompts, value = self._prompts, self._semantic_prior
        examples = isinstance(value, Mapping)
        with prompts.scorer.whole_embedding() if examples else nullcontext():
            override = resolve(prompts.scorer, value, find_steerable(prompts.adapters))
        self._block = Block(override)
        prompts.channel.blocks.enter(self._block)

    def __exit__(self, *_: Any) -> None:
        if self._block is not None:
            self._prompts.channel.blocks.leave(self._block)
