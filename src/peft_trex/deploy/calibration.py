"""Static weights for an input-dependent adapter: the best ones in closed form, and what they miss.

Axis legend: N tokens, D_in and D_out a layer's widths, r_a input and r_b output features, n the width of the features
that a fit starts from (r_a for "core", D_in for "input"), K clusters, S = K + 1 sets of tokens, the last of which has
those without a cluster.

A layer adds `gate * B m` with `m = a G` and `a = A x`, where G depends on token and prompt. The static U that misses
least of it, `E |B m - B U z|^2` for z = a or z = x, is `E[m z^T] E[z z^T]^-1`, whatever B is. The result is a LoRA of
rank r_b or less.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data_pass import Attended, Data, DataPass, check_count, check_unmerged
from ..layer import TRexLayer
from ..mixture import mix_features
from ..model import find_peft_model, find_tuner
from ..parameters import Kinship
from ..prior.inputs import Inputs
from ..undo import Snapshot, Undone
from .moments import RIDGE, Moments, add_products, ridge
from .shared import InputSums, fill, fitting, share

Fit = Literal["auto", "core", "input"]
# With four tokens for each entry of a layer's input, the fit to "input" missed more of new tokens than "core" did
# (`benchmarks/results/studies.md`); with ten, on the demo's tasks, it was far better. "auto" asks for so many.
LEAST_TOKENS = 10


@dataclass(frozen=True)
class TRexMergeReport:
    """What static weights miss. Errors are shares of the energy that the adapter adds: 0 misses nothing.

    Attributes:
        fits: "core" or "input" for each layer, as [`calibrate_trex_merge`] explains them.
        tokens: the number of tokens that were seen.
        layers: E |adapter - static|^2 / E |adapter|^2 of each layer over these tokens.
        error: the same for all layers together, each counting by the energy that it adds.
        mean_routing_error: the same for the mean routing, which merging uses without a calibration.
        cluster_error: the same if each prompt gets the static weights of its cluster; None without `per_cluster`.
        cluster_tokens: tokens of each of the K clusters; empty without `per_cluster`. One without tokens gets the
            weights of all tokens.
    """

    fits: dict[str, str]
    tokens: int
    layers: dict[str, float]
    error: float
    mean_routing_error: float
    cluster_error: float | None = None
    cluster_tokens: tuple[int, ...] = ()

    def __str__(self) -> str:
        ranked = sorted(self.layers.items(), key=itemgetter(1))
        (_, median), (name, worst) = ranked[len(ranked) // 2], ranked[-1]
        fits = Counter(self.fits.values()).most_common()
        fit = fits[0][0] if len(fits) == 1 else " and ".join(f"{kind} in {count} layers" for kind, count in fits)
        text = (
            f"T-REX merge ({fit}, {self.tokens} tokens): misses {self.error:.2%} of what the adapter adds, the "
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
    fit: Fit = "auto",
    memory_gb: float = 2.0,
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
            weights or to its own best core, whichever misses less, as if it had seen D_in tokens more.
        fit: "core" finds the best (r_b, r_a) matrix between A and B, with a few hundred numbers for each layer in
            memory and in the adapter's file. "input" finds the best (r_b, D_in) matrix before B, which misses far
            less. It sums up (D_in, D_in) moments for each set of tokens, once for layers that read the same tensor (q,
            k and v), and reads the data again for what `memory_gb` has no room for. "auto" reads the data once, and
            takes "input" for the layers whose moments fit into `memory_gb`, narrow inputs first, and that see at least
            ten tokens for each entry of their input; "core" for the others.
        memory_gb: for the moments of "input" that are held at once, in GB of 2^30 bytes, beside the model.

    Raises:
        ValueError, TypeError: if there is no such adapter, it is merged, `per_cluster` has no fitted prior to go by,
            the data have fewer tokens than r_a, or the adapter or the data make NaN.
    """
    tuner = find_tuner(model)
    config, prior = tuner.config_of(adapter_name), tuner.prior_of(adapter_name)
    check_count("max_batches", max_batches)
    if fit not in get_args(Fit):
        raise ValueError(f"fit={fit!r} is unknown; use 'auto', 'core' or 'input'.")
    if isinstance(memory_gb, bool) or not isinstance(memory_gb, (int, float)) or not 0 <= memory_gb < math.inf:
        raise ValueError(f"memory_gb={memory_gb!r} must be a finite number of at least 0.")
    if per_cluster and (prior is None or not prior.fitted):
        reason = "is not fitted" if config.use_prior else "is switched off (use_prior=False)"
        raise ValueError(f"per_cluster=True goes by the clusters of the prior, which {reason}; set per_cluster=False.")
    check_unmerged(tuner, "the calibration")
    layers, clusters = tuner.layers_of(adapter_name), config.num_clusters if per_cluster else 0
    data = Data(dataloader, max_batches, "T-REX merge" if progress else None)
    data, passes = _plan(model, adapter_name, data, 1 + clusters, (fit, int(memory_gb * 2**30)))
    solutions: dict[str, _Solution] = {}
    for wide in passes:
        sums = _Sums({name: layers[name] for name in (wide if fit == "input" else layers)}, wide, 1 + clusters)
        _gather(model, adapter_name, data, sums)
        for name in sums.layers:
            solutions[name] = _solve(name, layers[name], adapter_name, sums.of(name), fit)
    report = _report({name: solutions[name] for name in layers}, clusters)
    with Undone(Snapshot(tuner)):
        for name, layer in layers.items():
            layer.keep_static(adapter_name, solutions[name].static, solutions[name].kinship if per_cluster else None)
        tuner.card_notes.setdefault(adapter_name, {})["merge"] = report
    return report


class _Solution(NamedTuple):
    """The static weights of a layer, and sums over its tokens."""

    fit: str
    static: Tensor  # (1 + K, r_b, n)
    tokens: list[int]  # (S,)
    # The sums of |B m|^2, and of what all tokens' weights, the mean routing and the clusters' weights miss of it.
    energy: float
    missed: tuple[float, float, float]
    kinship: Kinship


class _Sums:
    """The moments of layers over the data: of each cluster and, last, of the tokens that have none.

    Those of `A x` are kept for each of the `layers`, those of x for the names in `wide`.
    """

    def __init__(self, layers: Mapping[str, Any], wide: Collection[str], sets: int) -> None:
        self.layers, self.wide, self.sets = layers, wide, sets
        self.cores: dict[str, Moments] = {}
        self.mixed: dict[str, Tensor] = {}  # the sums of m x^T (S, r_b, D_in)
        self.inputs = InputSums(sets)

    def of(self, name: str) -> tuple[Moments, Moments | None]:
        """The moments of a layer: of `A x`, and of x if there are some."""
        core, inputs = self.cores[name], self.inputs.of(name)
        return core, None if inputs is None else Moments(inputs, self.mixed[name], core.mm, core.tokens)


def _plan(
    model: nn.Module, adapter_name: str, data: Data, sets: int, limits: tuple[Fit, int]
) -> tuple[Data, list[Collection[str]]]:
    """The layers that are fitted from all of their input, in each pass over the data, and data that can be read anew.

    The first batch tells which layers share their inputs, where that matters.
    """
    (fit, most), layers = limits, find_tuner(model).layers_of(adapter_name)
    if fit == "core":
        return data, [()]
    alone = share(layers, adapter_name, (), sets)
    if sum(shared.size for shared in alone) <= most:
        return data, [list(layers)]
    once = isinstance(data.batches, Iterator)
    first: Iterable[Any] = data.batches
    if once:
        first, rest = itertools.tee(data.batches)
        data = replace(data, batches=rest)
    watched = _Sums(layers, list(layers), 0)
    _gather(model, adapter_name, Data(first, 1), watched)
    together = share(layers, adapter_name, watched.inputs.groups, sets)
    if fit == "auto":
        return data, [fitting(layers, together, most)]
    passes = fill(together, most)
    if once and len(passes) > 1:
        raise ValueError(
            f"fit='input' reads the data {len(passes)} times for this model, but the dataloader is an iterator, which "
            "can be read once; give a DataLoader or a list of batches, more memory_gb, or use fit='auto'."
        )
    return data, list(passes)


def _gather(model: nn.Module, adapter_name: str, data: Data, sums: _Sums) -> None:
    """Run the model over the data, and sum up what the layers do."""
    tuner, peft_model, sets = find_tuner(model), find_peft_model(model), sums.sets
    for name, layer in sums.layers.items():
        A, B = layer.trex_A[adapter_name], layer.trex_B[adapter_name]
        # MPS has no float64.
        device = torch.device("cpu") if A.device.type == "mps" else A.device
        sums.cores[name] = Moments.zeros(sets, len(A), B.shape[1], device)
        if name in sums.wide:
            sums.mixed[name] = sums.cores[name].mz.new_zeros(sets, B.shape[1], A.shape[1])

    def count(name: str, layer: TRexLayer, args: tuple) -> None:
        A, core = layer.trex_A[adapter_name], sums.cores[name]
        tokens = layer.tokens_of(args[0])
        x, kept = layer._cast_input_dtype(tokens, A.dtype), attended.kept(tokens, layer)
        clusters = layer.cluster_of(args[0], adapter_name) if sets > 1 else x.new_zeros(x.shape[:-1], dtype=torch.long)
        where = clusters[kept].to(core.zz.device)
        rows = sums.inputs.read(name, tokens, x, kept, where) if name in sums.wide else None
        if not sets:
            return
        a = F.linear(x, A)
        m = mix_features(a, layer.expert_weights(args[0], adapter_name), layer.trex_settings[adapter_name].layout)
        a, m = (values[kept].to(core.zz.device) for values in (a, m))
        core.add(a, m, where)
        if rows is not None:
            add_products(sums.mixed[name], m, rows, where)

    passing = DataPass(tuner, adapter_name, data)
    with Undone(passing), Attended(tuner) as attended, passing as batches, ExitStack() as hooks:
        for name, layer in sums.layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(count, name)))
        for batch in batches:
            attended.start(Inputs.of(batch))
            peft_model(**batch)
            sums.inputs.close()


def _solve(
    name: str, layer: TRexLayer, adapter_name: str, sums: tuple[Moments, Moments | None], fit: Fit
) -> _Solution:
    """Static weights for all tokens of a layer and for those of each cluster."""
    parameters, (core, wide) = (layer.trex_A, layer.trex_B, layer.trex_gate), sums
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
    missed_by_mean, kind, moments = total.missed(start, BB), "core", core
    static = _fit_sets(core, BB, start[None], RIDGE["core"])
    # The width tells a core from a wide matrix; where r_a = D_in it cannot, so the core is stored as a wide one.
    widened = A.shape[0] == A.shape[1]
    if wide is not None and (fit == "input" or tokens >= LEAST_TOKENS * A.shape[1]):
        kind, moments, widened = "input", wide, False
        static = _fit_sets(wide, BB, static @ A, RIDGE["input"])
    # Tokens without a cluster get the weights of all tokens.
    by_cluster = zip([*static[1:], static[0]], map(moments.of, range(len(moments.tokens))), strict=True)
    missed = (moments.of().missed(static[0], BB), missed_by_mean, sum(each.missed(U, BB) for U, each in by_cluster))
    energy = (BB * total.mm).sum().item()
    clusters = static[1:]
    added = (BB @ clusters @ moments.of().zz / max(1, tokens)).flatten(1)  # (K, r_b n)
    kinship = Kinship((added @ clusters.flatten(1).T).cpu(), core.tokens[:-1].cpu(), energy)
    static = (static @ A if widened else static).float()
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
