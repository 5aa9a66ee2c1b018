"""Static weights for an input-dependent adapter: the best ones in closed form, and what they miss.

Axis legend: N tokens, D_in and D_out a layer's widths, r_a input and r_b output features, n the width of the features
that a fit starts from (r_a for "core", D_in for "input"), K clusters, S = 1 + K sets of tokens.

A layer adds `gate * B m` with `m = a G` and `a = A x`, where G depends on token and prompt. The static U that misses
least of it, `E |B m - B U z|^2` for z = a or z = x, is `E[m z^T] E[z z^T]^-1`, whatever B is. The result is a LoRA of
rank r_b or less.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data_pass import Attended, Data, DataPass, check_count, check_unmerged
from ..layer import TRexLayer
from ..mixture import mix_features
from ..model import find_peft_model, find_tuner
from ..prior.inputs import Inputs
from ..undo import Snapshot, Undone
from .moments import RIDGE, Moments, ridge

Fit = Literal["core", "input"]
# Moments (D_in, D_in) of this size are held at once; if the layers need more, the data are read several times.
WIDE_BYTES = 2 << 30


@dataclass(frozen=True)
class TRexMergeReport:
    """What static weights miss. Errors are shares of the energy that the adapter adds: 0 misses nothing.

    Attributes:
        fit, tokens: "core" or "input", and the number of tokens that were seen.
        ridge: what was added to the diagonal of the second moments, as a share of its mean.
        layers: E |adapter - static|^2 / E |adapter|^2 of each layer over these tokens.
        error: the same for all layers together, each counting by the energy that it adds.
        mean_routing_error: the same for the mean routing, which merging uses without a calibration.
        cluster_error: the same if each prompt gets the static weights of its cluster; None without `per_cluster`.
        cluster_tokens: tokens of each of the K clusters; empty without `per_cluster`. One without tokens gets the
            weights of all tokens.
    """

    fit: str
    tokens: int
    ridge: float
    layers: dict[str, float]
    error: float
    mean_routing_error: float
    cluster_error: float | None = None
    cluster_tokens: tuple[int, ...] = ()

    def __str__(self) -> str:
        ranked = sorted(self.layers.items(), key=itemgetter(1))
        (_, median), (name, worst) = ranked[len(ranked) // 2], ranked[-1]
        text = (
            f"T-REX merge ({self.fit}, {self.tokens} tokens): misses {self.error:.2%} of what the adapter adds, the "
            f"mean routing {self.mean_routing_error:.2%}; median layer {median:.2%}, worst {worst:.2%} ({name})"
        )
        if self.cluster_error is None:
            return text
        clusters, empty = len(self.cluster_tokens), self.cluster_tokens.count(0)
        return f"{text}; one for each of {clusters} clusters ({empty} without tokens): {self.cluster_error:.2%}"


def calibrate_trex_merge(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    per_cluster: bool = False,
    fit: Fit = "core",
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
            cluster is drawn to the weights of all tokens as if it had seen r_a (D_in for "input") of these more.
        fit: "core" finds the best (r_b, r_a) matrix between A and B, with a few hundred numbers for each layer in
            memory and in the adapter's file. "input" finds the best (r_b, D_in) matrix before B, which misses less. It
            sums up (D_in, D_in) moments for each layer and set of tokens, and reads the data once for every 2 GB.

    Raises:
        ValueError, TypeError: if there is no such adapter, it is merged, `per_cluster` has no fitted prior to go by,
            the data have fewer tokens than r_a, or the adapter or the data make NaN.
    """
    tuner = find_tuner(model)
    config, prior = tuner.config_of(adapter_name), tuner.prior_of(adapter_name)
    check_count("max_batches", max_batches)
    if fit not in RIDGE:
        raise ValueError(f"fit={fit!r} is unknown; use 'core' or 'input'.")
    if per_cluster and (prior is None or not prior.fitted):
        reason = "is not fitted" if config.use_prior else "is switched off (use_prior=False)"
        raise ValueError(f"per_cluster=True goes by the clusters of the prior, which {reason}; set per_cluster=False.")
    check_unmerged(tuner, "the calibration")
    layers, clusters = tuner.layers_of(adapter_name), config.num_clusters if per_cluster else 0
    groups = _groups(layers, 1 + clusters, fit)
    if len(groups) > 1 and isinstance(dataloader, Iterator):
        raise ValueError(
            f"fit='input' reads the data {len(groups)} times for this model, but the dataloader is an iterator, which "
            "can be read once; give a DataLoader or a list of batches, or use fit='core'."
        )
    data = Data(dataloader, max_batches, "T-REX merge" if progress else None)
    solutions: dict[str, _Solution] = {}
    for group in groups:
        moments = _gather(model, adapter_name, group, data, 1 + clusters, fit)
        for name, layer in group.items():
            solutions[name] = _solve(name, layer, adapter_name, moments.pop(name), fit)
    report = _report(solutions, fit, clusters)
    with Undone(Snapshot(tuner)):
        for name, layer in layers.items():
            layer.keep_static(adapter_name, solutions[name].static)
        tuner.card_notes.setdefault(adapter_name, {})["merge"] = report
    return report


class _Solution(NamedTuple):
    """The static weights of a layer, and sums over its tokens."""

    static: Tensor  # (S, r_b, n)
    tokens: list[int]  # (S,)
    # The sums of |B m|^2, and of what all tokens' weights, the mean routing and the clusters' weights miss of it.
    energy: float
    missed: tuple[float, float, float]


def _groups(layers: Mapping[str, TRexLayer], sets: int, fit: Fit) -> list[dict[str, TRexLayer]]:
    """The layers in groups whose moments can be held at once."""
    groups: list[dict[str, TRexLayer]] = [{}]
    held = 0
    for name, layer in layers.items():
        size = sets * layer.in_features**2 * 8 if fit == "input" else 0
        held += size
        if groups[-1] and held > WIDE_BYTES:
            groups.append({})
            held = size
        groups[-1][name] = layer
    return groups


def _gather(
    model: nn.Module, adapter_name: str, layers: Mapping[str, Any], data: Data, sets: int, fit: Fit
) -> dict[str, Moments]:
    """The moments of these layers over the data: of each cluster and, last, of the tokens that have none."""
    tuner, peft_model, moments = find_tuner(model), find_peft_model(model), {}
    for name, layer in layers.items():
        A, B = layer.trex_A[adapter_name], layer.trex_B[adapter_name]
        # MPS has no float64.
        device = torch.device("cpu") if A.device.type == "mps" else A.device
        moments[name] = Moments.zeros(sets, A.shape[1 if fit == "input" else 0], B.shape[1], device)

    def count(name: str, layer: TRexLayer, args: tuple) -> None:
        A, sums = layer.trex_A[adapter_name], moments[name]
        x = layer._cast_input_dtype(args[0], A.dtype)
        a = F.linear(x, A)
        m = mix_features(a, layer.expert_weights(x, adapter_name), layer.trex_settings[adapter_name].layout)
        clusters = layer.cluster_of(x, adapter_name) if sets > 1 else x.new_zeros(x.shape[:-1], dtype=torch.long)
        mask = attended.kept(args[0], layer)
        sums.add(*(values[mask].to(sums.zz.device) for values in (x if fit == "input" else a, m, clusters)))

    passing = DataPass(tuner, adapter_name, data)
    with Undone(passing), Attended(tuner) as attended, passing as batches, ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(count, name)))
        for batch in batches:
            attended.start(Inputs.of(batch))
            peft_model(**batch)
    return moments


def _solve(name: str, layer: TRexLayer, adapter_name: str, moments: Moments, fit: Fit) -> _Solution:
    """Static weights for all tokens of a layer and for those of each cluster."""
    parameters = (layer.trex_A, layer.trex_B, layer.trex_gate)
    A, B, gate = (parameter[adapter_name].detach().to(moments.zz) for parameter in parameters)
    BB = torch.sigmoid(layer.trex_settings[adapter_name].temperature * gate) ** 2 * (B.T @ B)
    start = best = layer.mean_core(adapter_name).to(A)
    total = moments.of()
    if not all(torch.isfinite(tensor).all() for tensor in (total.zz, total.mm, start, BB)):
        raise ValueError(
            f"NaN or infinity came up in the layer {name}: the adapter {adapter_name!r} seems to be broken, or the "
            "model on this data. Nothing was stored."
        )
    tokens = int(total.tokens)
    if 0 < tokens < len(A):
        raise ValueError(
            f"The layer {name} saw {tokens} tokens, fewer than the adapter has input vectors (r_a={len(A)}); a fit "
            "needs many times as many. Give more batches. Nothing was stored."
        )
    if fit == "input":
        core = Moments(A @ total.zz @ A.T, total.mz @ A.T, total.mm, total.tokens)
        start, best = start @ A, core.solve(start, ridge(core.zz, RIDGE["core"])) @ A
    pull = ridge(total.zz, RIDGE[fit])
    best = total.solve(best, pull)
    # Each cluster is drawn to the weights of all tokens as if it had seen n tokens more of them.
    few = pull + total.zz * (len(total.zz) / max(1, tokens))
    *clusters, rest = (moments.of(index) for index in range(len(moments.tokens)))
    statics = [cluster.solve(best, few) for cluster in clusters]
    missed_by_clusters = sum(cluster.missed(U, BB) for cluster, U in zip(clusters, statics, strict=True))
    static = torch.stack([best, *statics])
    # The width tells a core from a wide matrix; where r_a = D_in it cannot, so the core is stored as a wide one.
    if fit == "core" and A.shape[0] == A.shape[1]:
        static = static @ A
    missed = (total.missed(best, BB), total.missed(start, BB), missed_by_clusters + rest.missed(best, BB))
    return _Solution(static.float(), moments.tokens.long().tolist(), (BB * total.mm).sum().item(), missed)


def _report(solutions: Mapping[str, _Solution], fit: Fit, clusters: int) -> TRexMergeReport:
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
        fit=fit,
        tokens=sum(tokens),
        ridge=RIDGE[fit],
        layers={name: solution.missed[0] / (solution.energy or 1.0) for name, solution in seen.items()},
        error=error,
        mean_routing_error=mean_routing_error,
        cluster_error=cluster_error if clusters else None,
        cluster_tokens=tuple(tokens[:clusters]),
    )
