"""Steering: a prior that is set instead of computed, which routes a prompt to a chosen skill.

Axis legend: B rows of a batch, N rows that were given (B, or 1 for all; one for each sequence where rows pack
several), K clusters, d width of the embedding.

A prompt acts on the layers through its scores alone, the cosines of its centred embedding with the centroids. A chosen
cluster stands for a prompt whose centred embedding is that centroid, a mixture for one in the direction of the
centroids' weighted sum, and an example for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layer import TRexLayer
from .prior import ForwardPrior, SemanticPrior
from .scoring import EMBEDS
from .spans import Prompts

if TYPE_CHECKING:
    from .model import TRexModel

SEMANTIC_PRIOR = "semantic_prior"
TOKENS = ("input_ids", "inputs_embeds")
WANTED = (
    "expected cluster ids (an int, or whole numbers (B,), -1 for a row's own prompt), weights of a mixture (floats "
    "(K,) or (B, K)), example prompts (a mapping with input_ids or semantic_embeds), or a mapping from adapters' "
    "names to these"
)


@contextmanager
def steer_trex(model: nn.Module, semantic_prior: Any) -> Iterator[None]:
    """Set the semantic prior of all that the model runs within the block, instead of computing it from the prompts.

        with steer_trex(model, 3):                            # the skill of cluster 3
            model.generate(**inputs)
        model.generate(**inputs, semantic_prior=[3, -1, 5])   # the same for one call, row by row

    Every forward and `generate` takes the same as the argument `semantic_prior`, which goes before a block around it;
    within blocks the innermost counts. What goes on from a cache keeps the prior that its prompt had.

    Blocks hold for the thread that they are entered in. Adapters that are disabled take no part, and are not asked for
    anything; the token router stays as it is.

    Args:
        model: a model with a T-REX adapter, as `get_peft_model` returns it or around that.
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
    from .model import find_tuner  # which itself reads what this module makes

    tuner = find_tuner(model)
    examples = isinstance(semantic_prior, Mapping)
    with tuner.prompts.scorer.whole_embedding() if examples else nullcontext():
        steering = resolve(tuner, semantic_prior, find_steerable(tuner))
    running = tuner.prompts.channel.running
    before, running.steering = running.steering, steering
    try:
        yield
    finally:
        running.steering = before


@dataclass(frozen=True)
class Steering:
    """What takes the place of the prompts' own scores.

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
        """N, 1 if all that was given is for all rows."""
        return max(len(scores) for scores in self.scores.values())

    def apply(self, prior: ForwardPrior, prompts: Prompts | None) -> ForwardPrior:
        """The prior of a forward with the steered rows replaced; `prompts` tells where they are in packed rows."""
        expected = prior.rows if prompts is None else prompts.count
        scores = dict(prior.scores)
        for name, given in self.scores.items():
            if name not in scores:
                raise ValueError(
                    f"{SEMANTIC_PRIOR} is for the adapter {name!r}, but the active adapters with a prior are "
                    f"{sorted(scores)}."
                )
            own, chosen = scores[name], self.chosen[name]
            if len(given) not in (1, expected):
                raise ValueError(
                    f"{SEMANTIC_PRIOR} has {len(given)} rows for {expected} prompts; give one for each, or one for "
                    "all."
                )
            if own is not None:
                given, chosen = given.to(own.device), None if chosen is None else chosen.to(own.device)
            if prompts is not None and len(given) > 1:
                given, chosen = prompts.spread(given), None if chosen is None else prompts.spread(chosen)
            elif own is not None and own.dim() == 3 and chosen is not None:
                given, chosen = given[:, None], chosen[:, None]
            else:  # all rows, because each may become several
                given = given.expand(prior.rows, -1)
            if chosen is not None:
                given = torch.where(chosen[..., None], given, torch.zeros_like(given) if own is None else own)
            scores[name] = given
        return replace(prior, scores=scores)


def find_steerable(tuner: TRexModel) -> list[str]:
    """The active adapters that have a prior, whether or not they are disabled now; a ValueError if there are none."""
    adapters = [name for name in tuner.active_adapters if tuner.config_of(name).use_prior]
    merged = {name for layer in tuner.modules() if isinstance(layer, TRexLayer) for name in layer.merged_adapters}
    if merged:
        raise ValueError(
            f"The adapters {sorted(merged)} are merged, and static weights cannot be steered by {SEMANTIC_PRIOR}; "
            "call unmerge_adapter() first."
        )
    if not adapters:
        raise ValueError(
            f"{SEMANTIC_PRIOR} was given, but no active adapter ({', '.join(tuner.active_adapters)}) has a prior: "
            "they have use_prior=False."
        )
    return adapters


@torch.no_grad()
def resolve(tuner: TRexModel, value: Any, adapters: list[str]) -> Steering:
    """What was given as `semantic_prior`, as scores for these adapters; see [`steer_trex`]."""
    scores: dict[str, Tensor] = {}
    chosen: dict[str, Tensor | None] = {}
    for name, each in _by_adapter(value, adapters).items():
        prior = tuner.prior_of(name)
        if prior is None or not prior.fitted:
            raise ValueError(
                f"{SEMANTIC_PRIOR} was given, but the prior of the adapter {name!r} is not fitted, so it has no "
                "clusters yet; call initialize_trex_prior first."
            )
        if isinstance(each, Mapping):
            directions, known = _examples(tuner, name, prior, each)
        else:
            directions, known = _clusters(prior, each)
        scores[name] = prior.score_direction(directions)
        # a look would break a compiled graph
        whole = not torch.compiler.is_compiling() and bool(known.all())
        chosen[name] = None if whole else known.to(scores[name].device)
    return Steering(scores, chosen)


def _by_adapter(value: Any, adapters: list[str]) -> Mapping[str, Any]:
    """What was given, for each adapter that it is for."""
    if isinstance(value, Mapping):
        if any(key in value for key in (*TOKENS, EMBEDS)):
            return dict.fromkeys(adapters, value)
        unknown = [key for key in value if key not in adapters]
        if unknown or not value:
            raise ValueError(
                f"{SEMANTIC_PRIOR} is a mapping with the keys {[str(key) for key in value]}; {WANTED}. The active "
                f"adapters with a prior are {adapters}."
            )
        return value
    if len(adapters) > 1:
        raise ValueError(
            f"{SEMANTIC_PRIOR} names clusters, which mean something else to each of the active adapters {adapters}; "
            f"give a mapping such as {{{adapters[0]!r}: ...}}, or an example prompt."
        )
    return {adapters[0]: value}


def _clusters(prior: SemanticPrior, value: Any) -> tuple[Tensor, Tensor]:
    """Directions (N, d) of cluster ids or mixtures, and which rows are steered (N,)."""
    clusters, device = prior.centroids.shape[0], prior.centroids.device
    try:
        given = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{SEMANTIC_PRIOR} is a {type(value).__name__}; {WANTED}.") from error
    looks = not torch.compiler.is_compiling()
    shape = tuple(given.shape)
    if given.is_floating_point():
        weights = given[None] if given.dim() == 1 else given
        if weights.dim() != 2 or weights.shape[1] != clusters:
            raise ValueError(f"{SEMANTIC_PRIOR} has shape {shape}, floats for K = {clusters} clusters; {WANTED}.")
        if looks and not (torch.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"{SEMANTIC_PRIOR} holds weights that are NaN, infinite or negative; {WANTED}.")
        weights = weights.to(device, torch.float32)
        with torch.autocast(device.type, enabled=False):
            directions, known = weights @ prior.centroids.float(), weights.any(-1)
        if looks and not (directions.norm(dim=-1) > 1e-6 * weights.sum(-1))[known].all():
            raise ValueError(f"The clusters that {SEMANTIC_PRIOR} mixes cancel out: the centroids' sum is zero.")
        return directions, known
    if given.dtype == torch.bool or given.is_complex() or given.dim() > 1:
        raise TypeError(f"{SEMANTIC_PRIOR} has shape {shape} and dtype {given.dtype}; {WANTED}.")
    ids = given.reshape(-1)
    if looks and not ((ids >= -1) & (ids < clusters)).all():
        raise ValueError(
            f"{SEMANTIC_PRIOR} names the clusters {ids.tolist()}; there are {clusters}, 0 to {clusters - 1}, and -1 "
            "for a row's own prompt."
        )
    return prior.centroids[ids.clamp(min=0).to(device, torch.int64)], ids >= 0


def _examples(
    tuner: TRexModel, adapter_name: str, prior: SemanticPrior, example: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Directions (N, d) of example prompts, and which rows are steered (N,)."""
    external = tuner.config_of(adapter_name).prior_encoder == "external"
    if not any(example.get(key) is not None for key in ((EMBEDS,) if external else TOKENS)):
        needed = EMBEDS if external else "input_ids"
        raise ValueError(
            f"The example in {SEMANTIC_PRIOR} has {sorted(str(key) for key in example)}, but the adapter "
            f"{adapter_name!r} has prior_encoder={tuner.config_of(adapter_name).prior_encoder!r} and needs {needed}."
        )
    if external:
        embeds = example[EMBEDS]
        if not isinstance(embeds, Tensor) or embeds.dim() != 2 or embeds.shape[1] != prior.dim:
            found = tuple(embeds.shape) if isinstance(embeds, Tensor) else f"a {type(embeds).__name__}"
            raise ValueError(f"The example's {EMBEDS} is {found}; expected a tensor (B, prior_dim = {prior.dim}).")
        if not torch.compiler.is_compiling() and not torch.isfinite(embeds).all():
            raise ValueError(f"The example's {EMBEDS} holds NaN or infinity.")
        known = embeds.any(-1)
    else:
        embeds, prompts = tuner.prompts.scorer.embed(example)
        if prompts.index is not None:
            raise ValueError(f"The example in {SEMANTIC_PRIOR} packs several prompts in a row; give each its own.")
        known = prompts.known
    return prior.direction(embeds), known
