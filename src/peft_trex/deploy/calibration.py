"""Static weights for an input-dependent adapter: the best ones in closed form, and what they miss.

Axis legend: N tokens, D_in and D_out a layer's widths, r_a input and r_b output features, n the width of the features
that a fit starts from (r_a for "core", D_in for "input"), K clusters, S = K + 1 sets of tokens, the last of which has
those without a cluster.

A layer adds `gate * B m` with `m = a G` and `a = A x`, where G depends on token and prompt. The static U that misses
least of it, `E |B m - B U z|^2` for z = a or z = x, is `E[m z^T] E[z z^T]^-1`, whatever B is. The result is a LoRA of
rank r_b or less.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..data_pass import Data, Reading, check_count, check_unmerged
from ..layer import TRexLayer
from ..model import find_tuner
from ..parameters import Kinship
from ..undo import Snapshot, Undone
from .cells import find_cells
from .distill import Polish, polish
from .gather import Features, Fit, Plan, Sums, gather, make_plan
from .moments import RIDGE, Moments, ridge
from .shared import leading

# "auto" asks for so many tokens for each of the features that a fit starts from. With only four or ten tokens for each
# entry of x, a fit to the whole of x missed more on new tokens than a fit to its leading directions did: see
# benchmarks/results/studies.md.
LEAST_TOKENS = {"leading": 10, "input": 20}


@dataclass(frozen=True)
class TRexMergeReport:
    """What static weights miss. Errors are shares of the energy that the adapter adds: 0 misses nothing.

    Attributes:
        fits: "core", "leading" or "input" for each layer, as [`calibrate_trex_merge`] explains them.
        tokens: the number of tokens that were seen.
        layers: E |adapter - static|^2 / E |adapter|^2 of each layer over these tokens.
        error: the same for all layers together, each counting by the energy that it adds.
        mean_routing_error: the same for the mean routing, which merging uses without a calibration.
        cluster_error: the same if each prompt gets the static weights of its cluster; None without `per_cluster`.
        cluster_tokens: tokens of each of the K clusters; empty without `per_cluster`. One without tokens gets the
            weights of all tokens.
        polished: what `distill_steps` did to the weights for all tokens and, with `per_cluster`, to those of the
            clusters; empty without it. All errors are those of the closed form, before it.
    """

    fits: dict[str, str]
    tokens: int
    layers: dict[str, float]
    error: float
    mean_routing_error: float
    cluster_error: float | None = None
    cluster_tokens: tuple[int, ...] = ()
    polished: tuple[Polish, ...] = ()

    def __str__(self) -> str:
        ranked = sorted(self.layers.items(), key=itemgetter(1))
        (_, median), (name, worst) = ranked[len(ranked) // 2], ranked[-1]
        fits = Counter(self.fits.values()).most_common()
        fit = fits[0][0] if len(fits) == 1 else " and ".join(f"{kind} in {count} layers" for kind, count in fits)
        text = (
            f"T-REX merge ({fit}, {self.tokens} tokens): misses {self.error:.2%} of what the adapter adds, the "
            f"mean routing {self.mean_routing_error:.2%}; median layer {median:.2%}, worst {worst:.2%} ({name})"
        )
        if self.cluster_error is not None:
            clusters, empty = len(self.cluster_tokens), self.cluster_tokens.count(0)
            text += f"; one for each of {clusters} clusters ({empty} without tokens): {self.cluster_error:.2%}"
        for each, whose in zip(self.polished, ("polished", "for each cluster"), strict=False):
            text += f"; {whose}, KL {each.before:.4f} to {each.after:.4f} nats on tokens held out"
        return text


def calibrate_trex_merge(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    per_cluster: bool | int = False,
    fit: Fit = "auto",
    memory_gb: float = 2.0,
    distill_steps: int = 0,
    max_batches: int | None = None,
    progress: bool = True,
) -> TRexMergeReport:
    """Find the static weights that come closest to an adapter, for merging it and for leaving as LoRA.

    They miss least of each layer's output over the data (least squares), and are saved and loaded with the adapter.
    `merge_adapter`, `merge_and_unload`, `get_delta_weight` and PEFT's `convert_to_lora` use them from then on instead
    of the mean routing. Training the adapter again (a forward in train mode) drops them.

    Args:
        model: a model with a T-REX adapter, which is not merged.
        dataloader: batches as the model's forward takes them, of the kind that the merged model will see; a few
            thousand tokens do for "core", many times the layers' width for "input". With labels, the prompt is told
            from the answer as in training. Padding does not count.
        adapter_name, max_batches, progress: as for [`routing_report`].
        per_cluster: fit the tokens of each cluster of prompts besides those of all, for [`save_trex_as_lora`]. A
            cluster is drawn to the weights of all tokens as if it had seen r_a of these more; for "input" to these
            weights or to its own best core, whichever misses less, as if it had seen D_in tokens more. A number
            instead of True asks for so many groups of prompts, which the data's own prompts tell; the data are read
            once more for that. Without a token router an adapter's weights hang on the prompt alone, so that more
            groups than the prior has clusters leave next to nothing to miss. Groups count as clusters everywhere.
        fit: "core" finds the best (r_b, r_a) matrix between A and B, with a few hundred numbers for each layer in
            memory and in the adapter's file. "input" finds the best (r_b, D_in) matrix before B. It sums up (D_in,
            D_in) moments for each set of tokens, once for layers that read the same tensor (q, k and v), and reads the
            data again for what `memory_gb` has no room for. "leading" finds the best one that reads `A x` and 64 to
            256 leading directions of x, as many as `memory_gb` has room for; it reads the data twice, and needs fewer
            tokens. "auto" takes "input" for the layers whose moments fit into `memory_gb`, narrow inputs first, and
            that see 20 tokens or more for each entry of their input; for the others "leading", where these see 10
            tokens or more for each direction and the data can be read again; else "core".
        memory_gb: for the moments that are held at once, in GB of 2^30 bytes, beside the model.
        distill_steps: then train all static weights together for so many steps of a batch each, on the divergence of
            their model's logits from the routed model's; with `per_cluster`, those of the clusters for so many more.
            A step costs what a training step costs. Every fourth batch is held out, and what does best on these is
            kept, the closed form if nothing does better. The batches are kept in memory.

    Raises:
        ValueError, TypeError: if there is no such adapter, it is merged or in a block of experts, `per_cluster` has
            no fitted prior to go by, the data have fewer tokens than r_a, or the adapter or the data make NaN.
    """
    tuner = find_tuner(model)
    config, prior = tuner.config_of(adapter_name), tuner.prior_of(adapter_name)
    check_count("max_batches", max_batches)
    check_count("distill_steps", distill_steps, least=0, none=False)
    if not isinstance(per_cluster, bool):
        check_count("per_cluster", per_cluster, none=False)
    if fit not in get_args(Fit):
        raise ValueError(f"fit={fit!r} is unknown; use one of {get_args(Fit)}.")
    if isinstance(memory_gb, bool) or not isinstance(memory_gb, (int, float)) or not 0 <= memory_gb < math.inf:
        raise ValueError(f"memory_gb={memory_gb!r} must be a finite number of at least 0.")
    if per_cluster and (prior is None or not prior.fitted):
        reason = "is not fitted" if config.use_prior else "is switched off (use_prior=False)"
        raise ValueError(f"per_cluster=True goes by the clusters of the prior, which {reason}; set per_cluster=False.")
    check_unmerged(tuner, "the calibration")
    layers, data = tuner.layers_of(adapter_name), Data(dataloader, max_batches, "T-REX merge" if progress else None)
    for name, layer in layers.items():
        layer.check_static(name)
    cells = 0 if isinstance(per_cluster, bool) else per_cluster
    clusters = config.num_clusters if per_cluster is True else cells
    if distill_steps or (cells and isinstance(dataloader, Iterator)):
        data = replace(data, batches=_read(data, least=2 if distill_steps else 0))
    with Undone(*[] if prior is None else [Snapshot(prior)]):
        if prior is not None:
            prior.cells = find_cells(model, adapter_name, data, cells).to(prior.mean.device) if cells else None
        plan = make_plan(model, adapter_name, data, 1 + clusters, (fit, int(memory_gb * 2**30)))
        solutions = _solve_all(model, adapter_name, plan, 1 + clusters, fit)
        report = _report(solutions, clusters)
        if distill_steps:
            statics = {name: solution.static for name, solution in solutions.items()}
            statics, polished = polish(model, adapter_name, data, statics, distill_steps)
            solutions = {name: solution._replace(static=statics[name]) for name, solution in solutions.items()}
            report = replace(report, polished=polished)
        with Undone(Snapshot(tuner)):
            for name, layer in layers.items():
                kinship = solutions[name].kinship if per_cluster else None
                layer.keep_static(adapter_name, solutions[name].static, kinship)
            tuner.card_notes.setdefault(adapter_name, {})["merge"] = report
    return report


def _read(data: Data, least: int) -> list[Any]:
    """The batches, which are read once; a ValueError if they are fewer than a polish needs."""
    reading = Reading(replace(data, title=None))
    with Undone(reading), reading as batches:
        found = list(batches)
    if len(found) < least:
        raise ValueError(
            f"distill_steps holds a part of the data out, but the dataloader gave {len(found)} batches; give at least "
            "two, which may be smaller."
        )
    return found


class _Solution(NamedTuple):
    """The static weights of a layer, and sums over its tokens."""

    fit: str
    static: Tensor  # (1 + K, r_b, n)
    tokens: list[int]  # (S,)
    # The sums of |B m|^2, and of what all tokens' weights, the mean routing and the clusters' weights miss of it.
    energy: float
    missed: tuple[float, float, float]
    kinship: Kinship


def _solve_all(model: nn.Module, adapter_name: str, plan: Plan, sets: int, fit: Fit) -> dict[str, _Solution]:
    """The static weights of all layers, by the layers' names."""
    layers = find_tuner(model).layers_of(adapter_name)
    solutions: dict[str, _Solution] = {}
    bases: dict[str, Tensor] = {}
    for wide in plan.passes:
        sums = Sums({name: layers[name] for name in (wide if fit == "input" else layers)}, sets, wide, plan.directions)
        gather(model, adapter_name, plan.data, sums)
        for name, layer in sums.layers.items():
            solutions[name] = _solve(name, layer, adapter_name, sums.of(name), fit)
            A, sketch, tokens = (
                layer.trex_A[adapter_name].detach(),
                sums.inputs.sketch_of(name),
                solutions[name].tokens,
            )
            n = plan.directions + len(A)
            # Half of all directions or more are no few, and would cost what all of x costs.
            pays = solutions[name].fit == "core" and 2 * n <= layer.in_features
            pays = pays and sum(tokens) >= LEAST_TOKENS["leading"] * n
            if sketch is not None and (fit == "leading" or pays):
                bases[name] = leading(sketch, A).to(torch.promote_types(A.dtype, torch.float32))
    if bases:
        sums = Sums({name: layers[name] for name in bases}, sets)
        sums.bases = bases
        gather(model, adapter_name, plan.data, sums)
        for name in bases:
            solutions[name] = _solve(name, layers[name], adapter_name, sums.of(name), fit)
    return {name: solutions[name] for name in layers}


def _solve(
    name: str, layer: TRexLayer, adapter_name: str, sums: tuple[Moments, Features | None], fit: Fit
) -> _Solution:
    """Static weights for all tokens of a layer and for those of each cluster."""
    parameters, (core, features) = (layer.trex_A, layer.trex_B, layer.trex_gate), sums
    A, B, gate = (parameter[adapter_name].detach().to(core.zz) for parameter in parameters)
    BB = torch.sigmoid(layer.trex_settings[adapter_name].temperature * gate) ** 2 * (B.T @ B)
    start = layer.mean_core(adapter_name).to(A)
    total, tokens = core.of(), int(core.tokens.sum())
    if not all(torch.isfinite(tensor).all() for tensor in (total.zz, total.mm, start, BB)):
        raise ValueError(
            f"NaN or infinity came up in the layer {name}: the adapter {adapter_name!r} seems to be broken, or the "
            "model on this data. Nothing was stored."
        )
    if 0 < tokens < len(A):
        raise ValueError(
            f"The layer {name} saw {tokens} tokens, fewer than the adapter has input vectors (r_a={len(A)}); a fit "
            "needs many times as many. Give more batches. Nothing was stored."
        )
    static, missed_by_mean = _fit_sets(core, BB, start[None], RIDGE["core"]), total.missed(start, BB)
    # A core is put before B as it is. The width tells it from a wide matrix, but not where r_a = D_in.
    kind, moments, into = "core", core, A if A.shape[0] == A.shape[1] else None
    if features is not None:
        n = features.moments.zz.shape[-1]
        if fit != "auto" or tokens >= LEAST_TOKENS[features.fit] * n:
            (kind, moments, basis), into = features, None
            starts = static @ A
            if basis is not None:
                into = basis.to(A)
                starts = starts @ into.T
            static = _fit_sets(moments, BB, starts, RIDGE["input"])
    # Tokens without a cluster get the weights of all tokens.
    by_cluster = zip([*static[1:], static[0]], map(moments.of, range(len(moments.tokens))), strict=True)
    missed = (moments.of().missed(static[0], BB), missed_by_mean, sum(each.missed(U, BB) for U, each in by_cluster))
    energy = (BB * total.mm).sum().item()
    clusters = static[1:]
    added = (BB @ clusters @ moments.of().zz / max(1, tokens)).flatten(1)  # (K, r_b n)
    kinship = Kinship((added @ clusters.flatten(1).T).cpu(), core.tokens[:-1].cpu(), energy)
    static = (static if into is None else static @ into).float()
    return _Solution(kind, static, core.tokens.long().tolist(), energy, missed, kinship)


def _fit_sets(moments: Moments, BB: Tensor, starts: Tensor, share: float) -> Tensor:
    """Static weights (1 + K, r_b, n) for all tokens and for those of each cluster.

    Args:
        BB: B^T B of the gated B.
        starts: (1, r_b, n) or (1 + K, r_b, n), weights to begin with, for all tokens and for each cluster.
        share: of the ridge.
    """
    total, K = moments.of(), len(moments.tokens) - 1
    pull = ridge(total.zz, share)
    found = [total.solve(starts[0], pull)]
    few = pull + total.zz * (len(total.zz) / max(1, int(total.tokens)))
    for index in range(K):
        cluster, start = moments.of(index), found[0]
        if len(starts) > 1 and cluster.missed(starts[1 + index], BB) < cluster.missed(start, BB):
            start = starts[1 + index]
        found.append(cluster.solve(start, few))
    return torch.stack(found)


def _report(solutions: Mapping[str, _Solution], clusters: int) -> TRexMergeReport:
    seen = {name: solution for name, solution in solutions.items() if any(solution.tokens)}
    unseen = [name for name in solutions if name not in seen]
    if not seen:
        raise ValueError("The dataloader gave no batch with a token; a calibration needs some. Nothing was stored.")
    if unseen:
        warnings.warn(
            f"{len(unseen)} adapted layers were never called on this data, such as {unseen[0]}; they keep their mean "
            "routing, and are not in the report.",
            stacklevel=3,
        )
    tokens = max((solution.tokens for solution in seen.values()), key=sum)
    # An adapter that adds nothing misses nothing.
    energy = sum(solution.energy for solution in seen.values()) or 1.0
    missed = zip(*(solution.missed for solution in seen.values()), strict=True)
    error, mean_routing_error, cluster_error = (sum(by_layer) / energy for by_layer in missed)
    return TRexMergeReport(
        fits={name: solution.fit for name, solution in seen.items()},
        tokens=sum(tokens),
        layers={name: solution.missed[0] / (solution.energy or 1.0) for name, solution in seen.items()},
        error=error,
        mean_routing_error=mean_routing_error,
        cluster_error=cluster_error if clusters else None,
        cluster_tokens=tuple(tokens[:clusters]),
    )
