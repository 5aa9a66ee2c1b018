"""A prior that is set instead of computed: from what a user gave to scores.

Axis legend: B rows of a batch, N rows that were given (B, or 1 for all; one for each sequence where rows pack
several), K clusters, d width of the embedding.

A prompt acts on the layers through its scores alone, the cosines of its centred embedding with the centroids. A chosen
cluster stands for a prompt whose centred embedding is that centroid, a mixture for one in the direction of the
centroids' weighted sum, and an example for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapters
from .inputs import EMBEDS, SEMANTIC_PRIOR, Inputs
from .scorer import PromptScorer
from .semantic_prior import SemanticPrior
from .state import Override

TOKENS = ("input_ids", "inputs_embeds")
WANTED = (
    "expected cluster ids (an int, or whole numbers (B,), -1 for a row's own prompt), weights of a mixture (floats "
    "(K,) or (B, K)), example prompts (a mapping with input_ids or semantic_embeds), or a mapping from adapters' "
    "names to these"
)


def find_steerable(adapters: Adapters) -> list[str]:
    """The active adapters that have a prior, whether or not they are disabled now; a ValueError if there are none."""
    names = adapters.with_prior()
    merged = {name for _, layer in adapters.layers() for name in layer.merged_adapters}
    if merged:
        raise ValueError(
            f"The adapters {sorted(merged)} are merged, and static weights cannot be steered by {SEMANTIC_PRIOR}; "
            "call unmerge_adapter() first."
        )
    if not names:
        raise ValueError(
            f"{SEMANTIC_PRIOR} was given, but no active adapter ({', '.join(adapters.active())}) has a prior: "
            "they have use_prior=False."
        )
    return names


@torch.no_grad()
def resolve(scorer: PromptScorer, value: Any, names: list[str]) -> Override:
    """What was given as `semantic_prior`, as scores for these adapters; see [`steer_trex`]."""
    scores: dict[str, Tensor] = {}
    chosen: dict[str, Tensor | None] = {}
    for name, each in _by_adapter(value, names).items():
        prior = scorer.adapters.prior_of(name)
        if prior is None or not prior.fitted:
            raise ValueError(
                f"{SEMANTIC_PRIOR} was given, but the prior of the adapter {name!r} is not fitted, so it has no "
                "clusters yet; call initialize_trex_prior first."
            )
        if isinstance(each, Mapping):
            directions, known = _examples(scorer, name, prior, each)
        else:
            directions, known = _clusters(prior, each)
        scores[name] = prior.score_direction(directions)
        # A look would break a compiled graph.
        whole = not torch.compiler.is_compiling() and bool(known.all())
        chosen[name] = None if whole else known.to(scores[name].device)
    return Override(scores, chosen)


def _by_adapter(value: Any, names: list[str]) -> Mapping[str, Any]:
    """What was given, for each adapter that it is for."""
    if isinstance(value, Mapping):
        if any(key in value for key in (*TOKENS, EMBEDS)):
            return dict.fromkeys(names, value)
        unknown = [key for key in value if key not in names]
        if unknown or not value:
            raise ValueError(
                f"{SEMANTIC_PRIOR} is a mapping with the keys {[str(key) for key in value]}; {WANTED}. The active "
                f"adapters with a prior are {names}."
            )
        return value
    if len(names) > 1:
        raise ValueError(
            f"{SEMANTIC_PRIOR} names clusters, which mean something else to each of the active adapters {names}; "
            f"give a mapping such as {{{names[0]!r}: ...}}, or an example prompt."
        )
    return {names[0]: value}


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
    scorer: PromptScorer, adapter_name: str, prior: SemanticPrior, example: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Directions (N, d) of example prompts, and which rows are steered (N,)."""
    encoder = scorer.adapters.encoder_of(adapter_name)
    external = encoder == "external"
    if not any(example.get(key) is not None for key in ((EMBEDS,) if external else TOKENS)):
        needed = EMBEDS if external else "input_ids"
        raise ValueError(
            f"The example in {SEMANTIC_PRIOR} has {sorted(str(key) for key in example)}, but the adapter "
            f"{adapter_name!r} has prior_encoder={encoder!r} and needs {needed}."
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
        embeds, prompts = scorer.embed(Inputs.of(example), adapter_name)
        if prompts.sequence is not None:
            raise ValueError(f"The example in {SEMANTIC_PRIOR} packs several prompts in a row; give each its own.")
        known = prompts.known
        # Of several turns of a chat, the last is the example.
        if prompts.index is not None:
            turns = prompts.index[:, -1]
            embeds, known = embeds[turns], known[turns]
    return prior.direction(embeds), known
