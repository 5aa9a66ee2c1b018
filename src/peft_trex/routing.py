"""What the routers of an adapter do on some data: a report of each layer, in figures, in words and as a picture.

Axis legend: N tokens, D_in and D_out a layer's widths, r_a input and r_b output vectors, E experts, K clusters, U
prompts of a batch.

All is summed up while the data pass, so memory does not grow with them. A layer adds `gate * B m` with `m_j = sum_i
p_ij` and `p_ij = a_i G_ij`, one number for each expert and token; the second moments of these E numbers say what any
part of the experts adds: see [`LayerRouting`].
"""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import check_count, reading
from .layer import TRexLayer
from .merging import Attended, only_adapter, uncompiled
from .mixture import expert_weights, router_logits
from .model import TRexModel, find_peft_model, find_tuner
from .prompts import batch_shape
from .spans import find_prompts

SHUT = 1e-3  # a gate below this lets nothing of note through
DEAD = 0.01  # of the energy that the mean expert of a layer adds: an expert with less is dead
ALIKE = 0.99  # cosine, over all tokens, of what two experts add: above it one is the other, up to a factor


@dataclass(frozen=True)
class LayerRouting:
    """What the routing of one layer did. Means are over its tokens; energies are means of squared lengths.

    Attributes:
        omega, gate: the two sigmoids, in [0, 1].
        router_entropy: entropy of a token's router, relative to log E: 1 is uniform, 0 chooses one expert. None
            without a router, as the next two.
        effective_experts: exp of that entropy, from 1 to E: how many experts a token uses.
        router_load: (E,), the router's mean probability of each expert.
        load: (E,), each expert's share of a token's weights (of their absolute values), router and prior together.
        used_experts: exp of the entropy of `load`, from 1 to E: how many experts all tokens together use.
        token_share: the router's share of a token's weights, in [0, 1]; the rest is the prior's.
        core_rank: how many directions the weights mix: the effective rank tr(GG')^2 / tr(GG'GG') of a token's weights
            (r_a, r_b). 1 where all experts weigh alike, since their sum then has rank one. None in the paired layout.
        energy: what the adapter adds, relative to the output of the layer it is in.
        input_contribution: (r_a,), the energy that would go if this input vector went, relative to the adapter's.
        output_contribution: (r_b,), likewise. Vectors that cancel each other may have more than 1 together.
        expert_contribution: (E,), likewise; in the grid layout expert (i, j) stands at i * r_b + j.
        dead: the experts that add less than 1 % of what the mean expert of the layer adds.
        duplicates: pairs of experts whose outputs agree, up to a factor (cosine over the tokens above 0.99).
        group_load: `load` over the tokens of each group.
        mutual_information: what an expert drawn by its weight says about the group of its token, in nats.
        group_share: share of the variance of a prompt's mean weights that lies between the groups, in [0, 1].
        tokens: how many were seen.
        moments: (E, E), the mean of p p^T for the tokens' experts `p_ij = a_i G_ij`, for [`prune_trex`]; `to_dict`
            leaves it out.
    """

    omega: float
    gate: float
    router_entropy: float | None
    effective_experts: float | None
    router_load: tuple[float, ...] | None
    load: tuple[float, ...]
    used_experts: float
    token_share: float
    core_rank: float | None
    energy: float
    input_contribution: tuple[float, ...]
    output_contribution: tuple[float, ...]
    expert_contribution: tuple[float, ...]
    dead: tuple[int, ...]
    duplicates: tuple[tuple[int, int], ...]
    group_load: dict[str, tuple[float, ...]]
    mutual_information: float | None
    group_share: float | None
    tokens: int
    moments: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "moments"}


@dataclass(frozen=True)
class RoutingReport:
    """What [`routing_report`] found.

    Attributes:
        adapter_name: the adapter.
        tokens: number of tokens that were seen (by the layer that saw most).
        layers: what each layer did, by its name in the base model.
        groups: the groups, in alphabetical order, and how many prompts each had; empty without `group_by`.
        clusters: (K,), how many prompts fell to each cluster; empty without a fitted prior, as the next.
        group_clusters: the same for the prompts of each group.
        prior_spread: standard deviation of a prompt's cluster scores, mean over the prompts.
        purity: share of the prompts whose group is the commonest of their cluster.
        nmi: normalised mutual information of the prompts' clusters and groups (arithmetic mean), in [0, 1].
        group_overlap: mean of |cos| between two groups' mean scores, in [0, 1]: at 0 each group has a prior of its
            own, at 1 all have the same or its opposite. Where it is large, see `TRexConfig.prior_whitening`.
    """

    adapter_name: str
    tokens: int
    layers: dict[str, LayerRouting]
    groups: dict[str, int]
    clusters: tuple[int, ...]
    group_clusters: dict[str, tuple[int, ...]]
    prior_spread: float | None
    purity: float | None
    nmi: float | None
    group_overlap: float | None

    def to_dict(self) -> dict[str, Any]:
        """All but the layers' moments, as what JSON can hold."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        return _plain({**asdict(_without_layers(self)), "layers": layers})

    def __str__(self) -> str:
        energies = {name: layer.energy for name, layer in self.layers.items()}
        strongest = max(energies, key=lambda name: energies[name])
        shut = sum(layer.gate < SHUT for layer in self.layers.values())
        dead = sum(len(layer.dead) for layer in self.layers.values())
        experts = sum(len(layer.load) for layer in self.layers.values())
        text = (
            f"T-REX routing of {self.adapter_name!r} ({self.tokens} tokens, {len(self.layers)} layers): adds "
            f"{statistics.median(energies.values()):.2%} of a layer's output energy in the median layer, "
            f"{energies[strongest]:.2%} in the strongest ({strongest}); {dead} of {experts} experts are dead, "
            f"{shut} gates shut"
        )
        entropies = [layer.router_entropy for layer in self.layers.values() if layer.router_entropy is not None]
        if entropies:
            text += f"; router entropy {statistics.median(entropies):.2f} of log E"
        if self.nmi is not None:
            text += f"; clusters against groups: purity {self.purity:.2f}, NMI {self.nmi:.2f}"
        return text

    def to_markdown(self) -> str:
        """Tables by kind of layer, what stands out by name, clusters and groups: as long for 200 layers as for 10."""
        from .routing_text import tables

        return "\n\n".join([f"# Routing of `{self.adapter_name}`", f"{self}.", *tables(self)]) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the report, as heatmaps over blocks and kinds of layers, to a file of any kind that matplotlib writes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        from .routing_plot import draw

        draw(self, path)


GroupBy = str | Callable[[dict[str, Any]], Sequence[Any] | Tensor]


def routing_report(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    group_by: GroupBy | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> RoutingReport:
    """Run the model over data, and report what the routers of an adapter do.

    The model is left as it was: its mode, its active adapters and its parameters; so is torch's random state.

    Args:
        model: a model with a T-REX adapter, which is not merged.
        dataloader: batches as the model's forward takes them. With labels, the prompt is told from the answer as in
            training; statistics are over all tokens that are attended to.
        adapter_name: the adapter.
        group_by: what the rows are compared by, their task for instance: the name of a column of the batch, which is
            taken out of it, or a function that gets the batch (a dict, from which it may take out what the model does
            not know) and returns the labels. One label a row, text or numbers; where rows pack several sequences, one
            a row or one a sequence. None compares nothing.
        max_batches: stop after this many batches; None reads all.
        progress: show a progress bar.

    Returns:
        A report: print it, or take `to_markdown()`, `to_dict()` and `plot(path)`.

    Raises:
        ValueError, TypeError: if there is no such adapter, it is merged, the data have no token or not the labels that
            `group_by` names, or the adapter or the data make NaN.
    """
    tuner = find_tuner(model)
    tuner.config_of(adapter_name)
    check_count("max_batches", max_batches)
    if group_by is not None and not isinstance(group_by, str) and not callable(group_by):
        raise TypeError(
            f"group_by is a {type(group_by).__name__}; expected the name of a column of the batch, or a function of "
            "the batch that returns one label for each row."
        )
    if any(layer.merged for layer in tuner.modules() if isinstance(layer, BaseTunerLayer)):
        raise ValueError(
            "An adapter is merged into the model; call unmerge_adapter() before its routing is looked at."
        )
    layers = layers_of(tuner, adapter_name)
    running, rows = find_peft_model(model), Rows(tuner)
    sums = {name: _Sums(layer, adapter_name) for name, layer in layers.items()}
    clusters = _Clusters(adapter_name)
    handles: list[Any] = []
    try:
        for own in sums.values():
            handles += own.watch(rows, clusters)
        embedding = tuner.input_embedding()
        home = next(tuner.parameters()).device if embedding is None else embedding.weight.device
        # hooks have no place in a compiled graph
        with (
            only_adapter(tuner, adapter_name),
            uncompiled(),
            torch.no_grad(),
            reading(dataloader, max_batches, progress, "T-REX routing") as batches,
        ):
            for batch in batches:
                if not isinstance(batch, Mapping):
                    raise TypeError(
                        f"The dataloader gave a {type(batch).__name__}; expected a mapping such as "
                        "{'input_ids': ...}."
                    )
                batch = dict(batch)
                labels = _labels(batch, group_by)
                batch = {key: part.to(home) if isinstance(part, Tensor) else part for key, part in batch.items()}
                rows.start(batch, labels)
                clusters.seen = False
                running(**batch)
    finally:
        for handle in (*handles, *rows.handles):
            handle.remove()
    return _report(adapter_name, sums, clusters)


def layers_of(tuner: TRexModel, adapter_name: str) -> dict[str, TRexLayer]:
    """The layers that an adapter is in, by their names in the base model."""
    return {
        name: module
        for name, module in tuner.model.named_modules()
        if isinstance(module, TRexLayer) and adapter_name in module.trex_A
    }


def look(layer: TRexLayer, adapter_name: str, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """A layer's routing for its input (..., D_in), within a forward.

    Returns the router's probabilities (..., E) or None, and the parts of the weights that are the router's and the
    prior's, (..., E) each; their sum is `layer.expert_weights`.
    """
    settings = {key: value for key, value in layer.trex_settings[adapter_name].items() if key != "layout"}
    router, down, prior = layer._routing(adapter_name, x)
    omega = torch.sigmoid(settings["temperature"] * layer.trex_omega[adapter_name].float())
    p, by_token, by_prior = None, x.new_zeros(1, dtype=torch.float32), x.new_zeros(1, dtype=torch.float32)
    if router is not None:
        p = expert_weights(x, router_logits(x, router, down), **{**settings, "token_scale": 1.0})
        by_token = omega * settings["token_scale"] * p
    if prior is not None:
        by_prior = (1 - omega) * expert_weights(x, prior=prior, **settings)
    shape = (*x.shape[:-1], max(by_token.shape[-1], by_prior.shape[-1]))
    return p, by_token.expand(shape), by_prior.expand(shape)


def entropy_of(p: Tensor) -> Tensor:
    """Entropy (...), in nats, of probabilities (..., E)."""
    return -torch.xlogy(p, p).sum(-1)


class Rows:
    """Of the batch that runs: which tokens are no padding, and the prompt that each belongs to, for every layer."""

    def __init__(self, tuner: TRexModel) -> None:
        self._tokens = Attended(tuner)
        self.handles = self._tokens.handles
        self.labels: list[str] | None = None  # of each prompt
        self.count = 0  # of the prompts, U
        self._index: Tensor | None = None  # (B, T), the prompt of each token where a row holds several
        self._rows = 0

    def start(self, batch: Mapping[str, Any], labels: list[str] | None = None) -> None:
        """Get to know a batch, and the labels of its rows, or of its sequences where rows hold several."""
        self._tokens.start(batch)
        self._rows, _ = batch_shape(batch)
        self._index, self.count = None, self._rows
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        if tokens is None and isinstance(embeds := batch.get("inputs_embeds"), Tensor):
            tokens = embeds[..., 0]
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and (mask is None or mask.dim() == 2):
            prompts = find_prompts(tokens, mask, None, batch.get("position_ids"))
            self._index = prompts.index
            self.count = prompts.count
        self.labels = labels
        if labels is None or len(labels) == self.count:
            return
        if len(labels) != self._rows:
            packed = "" if self._index is None else f" that pack {self.count} sequences"
            raise ValueError(
                f"group_by gave {len(labels)} labels for a batch of {self._rows} rows{packed}; expected one a row."
            )
        assert self._index is not None
        where = torch.zeros(self.count, dtype=torch.long)
        where[self._index.flatten().cpu()] = torch.arange(self._rows).repeat_interleave(self._index.shape[1])
        self.labels = [labels[row] for row in where.tolist()]

    def kept(self, x: Tensor, layer: TRexLayer) -> Tensor:
        """(...), bool, for a layer's input `x` (..., D_in)."""
        return self._tokens.kept(x, layer)

    def prompts_of(self, x: Tensor) -> Tensor | None:
        """(...), the number of each token's prompt; None where a layer's input does not tell."""
        if self._index is not None:
            if x.shape[:-1] == self._index.shape:
                return self._index.to(x.device)
            return self._index.to(x.device).flatten() if x.shape[:-1] == (self._index.numel(),) else None
        numbers = torch.arange(self._rows, device=x.device)
        if x.shape[0] == self._rows:
            return numbers.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
        if x.dim() == 2 and self._rows and x.shape[0] % self._rows == 0:
            return numbers.repeat_interleave(x.shape[0] // self._rows)
        return None


class _Clusters:
    """Counts of the prompts of each cluster, by group. The last place is of prompts that have nothing to go by."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self.seen = False  # whether the batch that runs is counted
        self.counts: dict[str | None, Tensor] = {}  # (K + 1,)
        self.scores: dict[str, Tensor] = {}  # (K,), their sum
        self.spread = self.known = 0.0

    def count(self, layer: TRexLayer, rows: Rows, x: Tensor, kept: Tensor) -> None:
        if self.seen or not layer.trex_uses_prior[self.adapter_name]:
            return
        prompts, scores = rows.prompts_of(x), layer._channel.scores(self.adapter_name, x)
        if scores is None or prompts is None:
            return
        self.seen = True
        scores = scores.reshape(*scores.shape[:-1], *[1] * (x.dim() - scores.dim()), scores.shape[-1])
        scores = scores.expand(*x.shape[:-1], scores.shape[-1])[kept].float()
        own = scores.new_zeros(rows.count, scores.shape[-1])
        own[prompts[kept]] = scores  # the same for all tokens of a prompt
        there = torch.zeros(rows.count, dtype=torch.bool, device=x.device)
        there[prompts[kept]] = True
        known = own.any(-1)
        self.spread += own[known].std(-1, correction=0).sum().item()
        self.known += known.sum().item()
        clusters, own = torch.where(known, own.argmax(-1), own.shape[-1]).tolist(), own.cpu()
        for number, cluster in enumerate(clusters):
            if there[number]:
                label = None if rows.labels is None else rows.labels[number]
                if label not in self.counts:
                    self.counts[label] = torch.zeros(own.shape[-1] + 1, dtype=torch.long)
                self.counts[label][cluster] += 1
                if label is not None:
                    self.scores[label] = self.scores.get(label, 0) + own[number]


class _Sums:
    """What a layer's tokens add up to."""

    def __init__(self, layer: TRexLayer, adapter_name: str) -> None:
        self.layer, self.adapter_name = layer, adapter_name
        A, B = layer.trex_A[adapter_name], layer.trex_B[adapter_name]
        self.grid = layer.trex_settings[adapter_name]["layout"] == "grid"
        self.r_a, self.r_b = A.shape[0], B.shape[1]
        self.experts = self.r_a * self.r_b if self.grid else self.r_a
        # MPS has no float64
        self.device = torch.device("cpu") if A.device.type == "mps" else A.device
        self.tokens = 0
        self.means = self._zeros(4)  # entropy, its exp, the router's share, the core's rank
        self.router_load, self.load = self._zeros(self.experts), self._zeros(self.experts)
        self.moments = self._zeros(self.experts, self.experts)
        self.base = self._zeros(())
        self.group_load: dict[str, Tensor] = {}
        self.group_tokens: dict[str, int] = {}
        # of the prompts' mean weights, for the variance between groups: their sum and number by group, their squares
        self.prompt_sum: dict[str, Tensor] = {}
        self.prompt_count: dict[str, int] = {}
        self.prompt_squares = self._zeros(())
        self._kept: Tensor | None = None  # of the input that the layer has just got

    def _zeros(self, *shape: Any) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def watch(self, rows: Rows, clusters: _Clusters) -> list[Any]:
        """Hooks on the layer and on what it adds to."""

        def before(_: nn.Module, args: tuple) -> None:
            kept = rows.kept(args[0], self.layer)
            clusters.count(self.layer, rows, args[0], kept)
            self._kept = kept
            self._add(args[0], kept, rows)

        def after(_: nn.Module, args: tuple, output: Tensor) -> None:
            if self._kept is not None and output.shape[:-1] == self._kept.shape:
                self.base += output[self._kept.to(output.device)].float().square().sum().to(self.base)
                self._kept = None

        layer: Any = self.layer
        return [layer.register_forward_pre_hook(before), layer.base_layer.register_forward_hook(after)]

    def _add(self, x: Tensor, kept: Tensor, rows: Rows) -> None:
        A = self.layer.trex_A[self.adapter_name]
        x = self.layer._cast_input_dtype(x, A.dtype)
        p, by_token, by_prior = look(self.layer, self.adapter_name, x)
        G = (by_token + by_prior)[kept]  # (N, E)
        tokens = len(G)
        if tokens == 0:
            return
        self.tokens += tokens
        a = F.linear(x, A)[kept].to(G.dtype)
        token_size, prior_size = by_token[kept].abs().sum(-1), by_prior[kept].abs().sum(-1)
        share = token_size / (token_size + prior_size).clamp(min=1e-30)
        entropy, rank = torch.zeros_like(share), torch.ones_like(share)
        if p is not None:
            chosen = p[kept]
            entropy = entropy_of(chosen)
            self.router_load += self._sum(chosen)
        if self.grid:
            core = G.unflatten(-1, (self.r_a, self.r_b))
            gram = core @ core.mT if self.r_a <= self.r_b else core.mT @ core
            rank = gram.diagonal(dim1=-2, dim2=-1).sum(-1).square() / gram.square().sum((-2, -1)).clamp(min=1e-30)
            added = (a[..., None] * core).flatten(-2)
        else:
            added = a * G
        self.means += self._sum(torch.stack((entropy, entropy.exp(), share, rank), -1))
        load = G.abs() / G.abs().sum(-1, keepdim=True).clamp(min=1e-30)
        self.load += self._sum(load)
        added = added.to(self.device).double()
        self.moments += added.T @ added
        prompts = rows.prompts_of(x)
        if rows.labels is not None and prompts is not None:
            self._add_groups(G, load, prompts[kept], rows)

    def _add_groups(self, G: Tensor, load: Tensor, prompts: Tensor, rows: Rows) -> None:
        assert rows.labels is not None

        def per_prompt(values: Tensor) -> Tensor:
            total = torch.zeros(rows.count, *values.shape[1:], dtype=torch.float64, device=self.device)
            return total.index_add_(0, prompts.to(self.device), values.to(self.device).double())

        counts = per_prompt(torch.ones(len(G), device=G.device))
        loads, means = per_prompt(load), per_prompt(G) / counts.clamp(min=1)[:, None]
        self.prompt_squares += means.square().sum()
        for number, label in enumerate(rows.labels):
            if counts[number] == 0:
                continue
            if label not in self.group_load:
                self.group_load[label], self.prompt_sum[label] = self._zeros(self.experts), self._zeros(self.experts)
                self.group_tokens[label] = self.prompt_count[label] = 0
            self.group_load[label] += loads[number]
            self.group_tokens[label] += int(counts[number])
            self.prompt_sum[label] += means[number]
            self.prompt_count[label] += 1

    def _sum(self, values: Tensor) -> Tensor:
        return values.to(self.device).double().sum(0)

    def finish(self, name: str) -> LayerRouting:
        layer, own = self.layer, self.adapter_name
        settings = layer.trex_settings[own]
        omega, gate = (
            float(torch.sigmoid(settings["temperature"] * logits[own].detach().double().cpu()))
            for logits in (layer.trex_omega, layer.trex_gate)
        )
        moments = self.moments / self.tokens
        B = layer.trex_B[own].detach().to(self.device).double()
        if not all(torch.isfinite(part).all() for part in (moments, self.load, self.base, B)):
            raise ValueError(
                f"NaN or infinity came up in the layer {name}: the adapter {own!r} seems to be broken, or the model "
                "on this data."
            )
        shared = energy_of_experts(moments, gate**2 * (B.T @ B), self.grid)  # (E, E)
        total = float(shared.sum())
        relative = shared / total if total > 0 else torch.zeros_like(shared)
        alone = relative.diagonal()
        if self.grid:
            blocks = relative.reshape(self.r_a, self.r_b, self.r_a, self.r_b)
            inputs, outputs = torch.einsum("ijik->i", blocks), torch.einsum("ijkj->j", blocks)
        else:
            inputs = outputs = alone
        lengths = shared.diagonal().clamp(min=0).sqrt()
        cosines = (shared / (lengths[:, None] * lengths).clamp(min=1e-300)).abs()
        dead = alone < DEAD * alone.mean()
        pairs = torch.nonzero(torch.triu((cosines > ALIKE) & ~dead[:, None] & ~dead, diagonal=1)).tolist()
        load = self.load / self.tokens
        routed = own in layer.trex_router
        entropy, effective, share, rank = (self.means / self.tokens).tolist()
        groups = sorted(self.group_load)
        return LayerRouting(
            omega,
            gate,
            (entropy / math.log(self.experts) if self.experts > 1 else 0.0) if routed else None,
            effective if routed else None,
            _tuple(self.router_load / self.tokens) if routed else None,
            _tuple(load),
            float(entropy_of(load / load.sum().clamp(min=1e-30)).exp()),
            share,
            rank if self.grid else None,
            total / max(float(self.base) / self.tokens, 1e-30),
            _tuple(inputs),
            _tuple(outputs),
            _tuple(alone),
            tuple(torch.nonzero(dead).flatten().tolist()),
            tuple((first, second) for first, second in pairs),
            {label: _tuple(self.group_load[label] / self.group_tokens[label]) for label in groups},
            _mutual_information(torch.stack([self.group_load[label] for label in groups])) if groups else None,
            self._between() if groups else None,
            self.tokens,
            moments.cpu().numpy(),
        )

    def _between(self) -> float:
        """Share of the variance of the prompts' mean weights that lies between the groups."""
        prompts = sum(self.prompt_count.values())
        everything = sum(self.prompt_sum.values(), self._zeros(self.experts)).square().sum() / prompts
        own = sum(float(self.prompt_sum[label].square().sum()) / count for label, count in self.prompt_count.items())
        variance = float(self.prompt_squares - everything)
        return min(1.0, max(0.0, own - float(everything)) / variance) if variance > 1e-12 * own else 0.0


def energy_of_experts(moments: Tensor, BB: Tensor, grid: bool) -> Tensor:
    """(E, E): the mean product of what two experts add, from the moments (E, E) and `gate^2 B^T B` (r_b, r_b)."""
    if not grid:
        return moments * BB
    r_a = len(moments) // len(BB)
    return moments * BB.repeat(r_a, r_a)


def _mutual_information(joint: Tensor) -> float:
    """In nats, of sums (groups, E) that need not add up to 1."""
    joint = joint / joint.sum().clamp(min=1e-30)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return max(0.0, float(torch.xlogy(joint, joint / apart.clamp(min=1e-300)).sum()))


def _labels(batch: dict[str, Any], group_by: GroupBy | None) -> list[str] | None:
    if group_by is None:
        return None
    if callable(group_by):
        found: Any = group_by(batch)
    elif group_by not in batch:
        raise ValueError(f"A batch has no column {group_by!r} to group by; it has {sorted(batch)}.")
    else:
        found = batch.pop(group_by)
    if isinstance(found, (Tensor, np.ndarray)):
        found = found.tolist()
    if isinstance(found, str) or not isinstance(found, Sequence) or any(isinstance(one, list) for one in found):
        raise TypeError(f"group_by gave a {type(found).__name__}; expected a list of one label for each row.")
    return [str(one) for one in found]


def _report(adapter_name: str, sums: Mapping[str, _Sums], clusters: _Clusters) -> RoutingReport:
    seen = {name: found for name, found in sums.items() if found.tokens}
    if not seen:
        raise ValueError("The dataloader gave no batch with a token; a report needs some.")
    if len(seen) < len(sums):
        unseen = [name for name in sums if name not in seen]
        warnings.warn(
            f"{len(unseen)} adapted layers were never called on this data, such as {unseen[0]}; they are not in the "
            "report.",
            stacklevel=3,
        )
    layers = {name: found.finish(name) for name, found in seen.items()}
    counted = max((found.prompt_count for found in seen.values()), key=lambda counts: sum(counts.values()))
    groups = {label: counted[label] for label in sorted(counted)}
    table = {label: counts[:-1] for label, counts in clusters.counts.items()}
    total = sum(table.values(), torch.zeros((), dtype=torch.long))
    purity = nmi = overlap = None
    named = [counts for label, counts in table.items() if label is not None]
    if named and clusters.known:
        purity, nmi = agreement(torch.stack(named).double())
        overlap = float(overlaps(clusters.scores).mean()) if len(named) > 1 else None
    return RoutingReport(
        adapter_name,
        max(found.tokens for found in seen.values()),
        layers,
        groups,
        tuple(total.tolist()) if table else (),
        {label: tuple(table[label].tolist()) for label in groups if label in table},
        clusters.spread / clusters.known if clusters.known else None,
        purity,
        nmi,
        overlap,
    )


def agreement(joint: Tensor) -> tuple[float, float]:
    """Purity, and normalised mutual information, of numbers of prompts (groups, clusters)."""
    entropies = [float(entropy_of(joint.sum(axis) / joint.sum())) for axis in (0, 1)]
    # a single cluster and a single group agree
    nmi = _mutual_information(joint) / statistics.mean(entropies) if any(entropies) else 1.0
    return float(joint.max(0).values.sum() / joint.sum()), nmi


def overlaps(scores: Mapping[str, Tensor]) -> Tensor:
    """|cos| between the scores (K,) of each two groups, which may be sums or means."""
    each = torch.nn.functional.normalize(torch.stack(list(scores.values())), dim=-1)
    return (each @ each.T).abs()[tuple(torch.triu_indices(len(each), len(each), 1))]


def _tuple(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def _without_layers(report: RoutingReport) -> RoutingReport:
    return RoutingReport(**{one.name: getattr(report, one.name) for one in fields(report)} | {"layers": {}})


def _plain(value: Any) -> Any:
    """The same with lists instead of tuples, as JSON gives it back."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value
