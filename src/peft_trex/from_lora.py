"""A T-REX adapter that begins as existing LoRA adapters: their leading rank-one parts are its experts.

Axis legend: n LoRA adapters, D_in and D_out a layer's widths, r_a input and r_b output vectors, E experts, K clusters,
R the rank of all adapters of a layer together, P prompts.

At the start the router R is zero, so that each expert has the weight `u = omega c_token / E` for the tokens, and
`(1 - omega) c_prior M s` more for a prompt with the scores s. What that allows differs by layout:

- paired: any sum of the experts b_e a_e^T. They are the largest singular parts of the adapters, scaled so that the
  weight u makes the mean of all adapters, and n u on its own experts, 0 on the others, makes one adapter.
- grid: B G^T A for any matrix G between shared bases, which are fitted to all adapters (Tucker-2). But equal weights
  make a matrix of rank one, which the bases are turned to: the best one for the mean of all adapters. What differs
  from that must come from the prior.

The prior's map M is fitted, in closed form, so that the scores of an adapter's own prompts give its weights.
No matrix (D_out, D_in) is formed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import TRexConfig
from .fitting import initialize_trex_prior
from .layer import TRexLayer
from .loras import Lora, Source, read_lora, stack
from .model import TRexModel, find_tuner
from .scoring import EMBEDS

RIDGE = 1e-4  # of the prior map's fit, as a share of the scores' mean square
SWEEPS = 30  # of the shared bases' fit
LEAST_MEAN = 0.1  # grid: strength of equal weights, as a share of an adapter's, where their mean is weaker


@dataclass(frozen=True)
class TRexFromLoraReport:
    """What `trex_from_lora` found. All errors are shares of a LoRA adapter's energy |dW|^2: 0 misses nothing.

    Attributes:
        adapters: the LoRA adapters' names; what follows has one value for each, in this order.
        layout: "paired" or "grid".
        errors: what the experts miss with the best weights, all layers together.
        start_errors: what the new adapter misses as it starts: for the adapter's own prompts where they were given
            (the mean of the error over them), else with equal weights.
        layers: the errors of each layer; None for an adapter that leaves it as it is.
        start_layers: the same of `start_errors`.
    """

    adapters: tuple[str, ...]
    layout: str
    errors: tuple[float, ...]
    start_errors: tuple[float, ...]
    layers: dict[str, tuple[float | None, ...]]
    start_layers: dict[str, tuple[float | None, ...]]

    def __str__(self) -> str:
        parts = [
            f"{name} misses {error:.2%}, {start:.2%} at the start"
            for name, error, start in zip(self.adapters, self.errors, self.start_errors, strict=True)
        ]
        ranked = [
            (max((e for e in errors if e is not None), default=0.0), name) for name, errors in self.layers.items()
        ]
        worst, layer = max(ranked)
        return f"T-REX from LoRA ({self.layout}): {'; '.join(parts)}; worst layer {worst:.2%} ({layer})"


def trex_from_lora(
    model: nn.Module,
    adapters: Sequence[Source],
    *,
    prompts: Sequence[Iterable[Mapping[str, Any]]] | None = None,
    adapter_name: str = "default",
    seed: int = 0,
    progress: bool = True,
    **config: Any,
) -> tuple[PeftModel, TRexFromLoraReport]:
    """Make a T-REX adapter whose experts begin as the leading rank-one parts of existing LoRA adapters.

        model, report = trex_from_lora(base, ["lora/french", "lora/sql"], prompts=[french, sql], trainable="router")

    In the paired layout (the default here) a layer's experts are the largest singular parts of the adapters' weights,
    each measured by its share of its adapter; with as many as the ranks add up to, nothing is missed. In the grid
    layout the adapters share fitted bases A and B. The router starts at zero. Equal weights then make the mean of the
    adapters (in the grid layout the best matrix of rank one for it); with `prompts`, the prior is fitted on them, and
    its map so that each adapter's own prompts begin with that adapter.

    Args:
        model: the base model, without any adapter. It is changed in place, as by `get_peft_model`.
        adapters: LoRA adapters of this base model: folders as `save_pretrained` makes them (safetensors only), or
            loaded ones, each a `PeftModel` for its active adapter or a pair (`PeftModel`, adapter's name). They stay
            as they are. Ranks, alphas and target modules may differ.
        prompts: for each adapter, batches of the prompts that it is for, as the forward takes them; read twice
            (iterators are kept in memory). Each adapter counts the same, however many it has. Several processes must
            all be given the same.
        adapter_name: the new adapter's name.
        seed: of the clustering.
        progress: show a progress bar.
        config: fields of [`TRexConfig`]. Left out, `expert_layout` is "paired", with as many experts as the largest
            sum of the adapters' ranks in a layer; `use_prior` is whether there are prompts; the prior's map is
            learned; target modules are those of all the adapters. `trainable="router"` leaves the experts as they are.

    Returns:
        The model with its new adapter, which saves, loads and trains as any, and a report of what it misses.

    Raises:
        ValueError, TypeError: if an adapter cannot be read, is not a plain LoRA of this model (DoRA, trained biases,
            `modules_to_save`, embeddings, starts that change the base weights), is zero or not finite; for a base
            model with adapters; for settings that leave no such start (`use_router=False`, `router_top_k`,
            `prior_map="identity"`); if prompts do not match. The base model is then as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected the base model.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The base model has an adapter already; give it without any. Adapters that are loaded into it can be "
            "saved, and given as folders once its unload() has taken them out."
        )
    if isinstance(adapters, (str, os.PathLike, PeftModel)) or not adapters:
        raise ValueError("adapters must be a list of at least one LoRA adapter.")
    loras = [read_lora(source) for source in adapters]
    layers = stack(model, loras)
    prompts = _check_prompts(prompts, loras)
    settings = _settings(config, loras, layers, prompts is not None)
    peft_model = get_peft_model(model, settings, adapter_name=adapter_name)
    try:
        tuner = find_tuner(peft_model)
        found = {name: layer for name, layer in tuner.model.named_modules() if isinstance(layer, TRexLayer)}
        missing = [name for name in layers if name not in found]
        if missing:
            raise ValueError(
                f"The new adapter has no layer at {len(missing)} modules that the LoRA adapters change, such as "
                f"{missing[0]}; leave target_modules out, or name them there."
            )
        scores = None
        if prompts is not None:
            initialize_trex_prior(peft_model, chain(*prompts), adapter_name=adapter_name, seed=seed, progress=progress)
            scores = _score(tuner, adapter_name, prompts)
        fits = {}
        for name, layer in found.items():
            parts = layers.get(name, [None] * len(loras))
            fits[name] = _start(layer, adapter_name, settings, parts, scores)
    except Exception:
        peft_model.base_model.unload()  # type: ignore[operator]
        raise
    return peft_model, _report(loras, settings, {name: fits[name] for name in layers})


def _check_prompts(prompts: Any, loras: list[Lora]) -> list[Iterable[Mapping[str, Any]]] | None:
    if prompts is None:
        return None
    if isinstance(prompts, Mapping) or not hasattr(prompts, "__len__") or len(prompts) != len(loras):
        found = f"{len(prompts)} of them" if hasattr(prompts, "__len__") else f"a {type(prompts).__name__}"
        raise ValueError(
            f"prompts must be a list of batches for each of the {len(loras)} LoRA adapters, in their order; got "
            f"{found}."
        )
    return [list(each) if isinstance(each, Iterator) else each for each in prompts]


def _settings(given: dict[str, Any], loras: list[Lora], layers: Mapping[str, list], with_prompts: bool) -> TRexConfig:
    """The new adapter's configuration."""
    unknown = sorted(set(given) - {field.name for field in fields(TRexConfig) if field.init})
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no field of TRexConfig.")
    values = {"expert_layout": "paired", "target_modules": sorted(layers), "use_prior": with_prompts, **given}
    if values["expert_layout"] == "paired":
        ranks = [sum(part[1].shape[0] for part in parts if part is not None) for parts in layers.values()]
        experts = values.get("r_a", values.get("r_b", max(ranks)))
        values = {"r_a": experts, "r_b": experts, **values}
    if values["use_prior"]:
        values.setdefault("prior_map", "learned")
    tasks = {lora.config.task_type for lora in loras}
    values.setdefault("task_type", tasks.pop() if len(tasks) == 1 else None)
    config = TRexConfig(**values)
    for name, wanted in (("use_router", True), ("router_top_k", None), ("init_weights", True)):
        if getattr(config, name) != wanted:
            raise ValueError(
                f"{name}={getattr(config, name)} leaves no such start: all experts begin with equal weights from the "
                "token router."
            )
    if config.expert_pattern:
        raise ValueError("expert_pattern is what prune_trex leaves; build the adapter whole, and prune it afterwards.")
    if config.use_prior and not config.learned_map:
        raise ValueError("The prior reaches the adapters' experts by a map; use prior_map='learned', or leave it out.")
    if with_prompts and not config.use_prior:
        raise ValueError("prompts are for the prior, which use_prior=False drops; leave one of the two out.")
    return config


@dataclass
class _Scores:
    """What the adapters' prompts look like to the prior, float64."""

    means: Tensor  # (n, K), mean scores of each adapter's prompts
    squares: Tensor  # (n, K, K), their second moments
    tells: Tensor  # (K, n): s @ tells is nearly the indicator of the adapter whose prompts have the scores s


@torch.no_grad()
def _score(tuner: TRexModel, adapter_name: str, prompts: list[Iterable[Mapping[str, Any]]]) -> _Scores:
    """Ridge regression of each prompt's adapter on its scores, the adapters counting the same."""
    prior, external = tuner.prior_of(adapter_name), tuner.config_of(adapter_name).prior_encoder == "external"
    assert prior is not None
    means, squares = [], []
    with tuner.prompts.scorer.whole_embedding():
        for number, batches in enumerate(prompts):
            parts = []
            for batch in batches:
                if external:
                    embeds = batch[EMBEDS]
                    parts.append(prior.score(embeds[embeds.any(-1)]).double().cpu())
                else:
                    embeds, found = tuner.prompts.scorer.embed(batch)
                    parts.append(prior.score(embeds[found.known]).double().cpu())
            scores = torch.cat(parts) if parts else torch.zeros(0, 0)
            if not len(scores):
                raise ValueError(f"There are no prompts for the LoRA adapter {number} (counted from 0).")
            means.append(scores.mean(0))
            squares.append(scores.T @ scores / len(scores))
    total = torch.stack(squares).sum(0)
    total += RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)
    return _Scores(torch.stack(means), torch.stack(squares), torch.linalg.solve(total, torch.stack(means).T))


@dataclass
class _Fit:
    """Energies of one layer, (n,): of each adapter, and what of it is missed."""

    energy: Tensor
    missed: Tensor
    missed_at_start: Tensor


@dataclass
class _Experts:
    """Bases of a layer, and the weights that its experts would need for each adapter were they scaled by one."""

    A: Tensor  # (r_a, D_in)
    B: Tensor  # (D_out, r_b)
    wanted: Tensor  # (n, E)
    equal: float  # the weight that all experts should have at equal weights
    missed: Tensor  # (n,), energy


@torch.no_grad()
def _start(
    layer: TRexLayer,
    adapter_name: str,
    config: TRexConfig,
    parts: list[tuple[Tensor, Tensor] | None],
    scores: _Scores | None,
) -> _Fit:
    """Set a layer's parameters, and measure what they miss."""
    known = [part if part is not None and part[0].any() and part[1].any() else None for part in parts]
    energy = torch.tensor([0.0 if part is None else _energy(*part) for part in known], dtype=torch.float64)
    layer.reset_trex_parameters(adapter_name)  # router, omega and gate; and B, where there is no more to begin with
    omega = gate = 0.5
    uniform = omega * layer.trex_settings[adapter_name]["token_scale"] / config.num_experts
    mapping = torch.zeros(config.num_experts, config.num_clusters, dtype=torch.float64)
    if not energy.any():
        return _Fit(energy, torch.zeros_like(energy), torch.zeros_like(energy))
    fit = _paired if config.expert_layout == "paired" else _grid
    experts = fit(known, energy, config, layer.trex_A[adapter_name].detach().double().cpu())
    scale = experts.equal / (gate * uniform)
    B = scale * experts.B
    prior_scale = (1 - omega) * config.prior_scale
    if scores is not None:
        wanted = experts.wanted / (gate * scale) - uniform  # (n, E), to come from the prior
        mapping = wanted.T @ scores.tells.T / prior_scale
    layer.trex_A[adapter_name].copy_(experts.A)
    layer.trex_B[adapter_name].copy_(B)
    if adapter_name in layer.trex_map:
        layer.trex_map[adapter_name].copy_(mapping)
    # weights g = uniform + prior_scale M s of experts with the Gram matrix H: |dW - W|^2 = |dW|^2 - 2 h g + g H g
    rows, columns = _pairs(config)
    a, b = experts.A[rows], gate * B[:, columns]  # (E, D_in), (D_out, E)
    H = (a @ a.T) * (b.T @ b)
    start = torch.empty_like(energy)
    for number, part in enumerate(known):
        h = torch.zeros(len(H), dtype=H.dtype)
        if part is not None:
            h = ((b.T @ part[0]) * (a @ part[1].T)).sum(1)
        mean, square = torch.full_like(h, uniform), uniform**2 * torch.ones_like(H)
        if scores is not None:
            more = prior_scale * mapping @ scores.means[number]
            spread = prior_scale**2 * mapping @ scores.squares[number] @ mapping.T
            mean, square = mean + more, square + uniform * (more[:, None] + more) + spread
        start[number] = energy[number] - 2 * h @ mean + (H * square).sum()
    return _Fit(energy, experts.missed, start.clamp(min=0))


def _pairs(config: TRexConfig) -> tuple[Tensor, Tensor]:
    """The row of A and the column of B that each expert is made of, (E,) each."""
    if config.expert_layout == "paired":
        return torch.arange(config.r_a), torch.arange(config.r_b)
    return torch.arange(config.r_a).repeat_interleave(config.r_b), torch.arange(config.r_b).repeat(config.r_a)


def _energy(up: Tensor, down: Tensor) -> float:
    """|up down|^2."""
    return float((torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T).square().sum())


def _paired(parts: list[tuple[Tensor, Tensor] | None], energy: Tensor, config: TRexConfig, start: Tensor) -> _Experts:
    """The singular parts with the largest shares of their adapters; equal weights make them the adapters' mean."""
    singular: list[tuple[Tensor, Tensor, Tensor] | None] = []
    candidates: list[tuple[float, int, int]] = []
    for number, part in enumerate(parts):
        if part is None:
            singular.append(None)
            continue
        (left, core_left), (right, core_right) = torch.linalg.qr(part[0]), torch.linalg.qr(part[1].T)
        u, s, v = torch.linalg.svd(core_left @ core_right.T)
        singular.append((left @ u, s, v @ right.T))
        candidates += [(-float(value**2 / energy[number]), number, k) for k, value in enumerate(s)]
    chosen = sorted(sorted(candidates)[: config.r_a], key=lambda candidate: candidate[1:])
    width = next(part[0].shape[0] for part in parts if part is not None)
    A, B = start.clone(), torch.zeros(width, config.r_b, dtype=torch.float64)
    wanted = torch.zeros(len(parts), config.r_a, dtype=torch.float64)
    missed = energy.clone()
    for expert, (_, number, k) in enumerate(chosen):
        found = singular[number]
        assert found is not None
        u, s, v = found
        A[expert], B[:, expert] = s[k].sqrt() * v[k], s[k].sqrt() * u[:, k]
        wanted[number, expert] = 1.0
    kept = {candidate[1:] for candidate in chosen}
    for number, found in enumerate(singular):
        if found is not None:
            dropped = [k for k in range(len(found[1])) if (number, k) not in kept]
            missed[number] = found[1][dropped].square().sum()
    return _Experts(A, B, wanted, 1 / len(parts), missed)


def _grid(parts: list[tuple[Tensor, Tensor] | None], energy: Tensor, config: TRexConfig, start: Tensor) -> _Experts:
    """Bases that are fitted to all adapters, turned so that equal weights make the best of rank one for their mean."""
    ups = [part[0] for part in parts if part is not None]
    left, core_left = torch.linalg.qr(torch.cat(ups, 1))
    right, core_right = torch.linalg.qr(torch.cat([part[1] for part in parts if part is not None]).T)
    begin, cores = 0, []  # the adapters between these bases
    for part in parts:
        rank = 0 if part is None else part[1].shape[0]
        columns = slice(begin, begin + rank)
        cores.append(core_left[:, columns] @ core_right[:, columns].T)
        begin += rank
    S = torch.stack(cores)  # (n, R_left, R_right)
    unit = S / energy.clamp(min=torch.finfo(energy.dtype).tiny).sqrt()[:, None, None]  # adapters count the same
    r_a, r_b = min(config.r_a, S.shape[2]), min(config.r_b, S.shape[1])
    L, R = _leading(unit, r_b), _leading(unit.mT, r_a)
    for _ in range(SWEEPS):  # each the best for the other
        L = _leading(unit @ R, r_b)
        R = _leading((L.T @ unit).mT, r_a)
    C = L.T @ S @ R  # (n, r_b, r_a)
    u, s, v = torch.linalg.svd(C.mean(0))
    turn_left, turn_right = _turn(u[:, 0]), _turn(v[0])
    C = turn_left.T @ C @ turn_right
    typical = C.square().sum((1, 2))[energy > 0].mean().sqrt()
    A = torch.zeros(config.r_a, start.shape[1], dtype=torch.float64)
    B = torch.zeros(left.shape[0], config.r_b, dtype=torch.float64)
    A[:r_a], B[:, :r_b] = (right @ R @ turn_right).T, left @ L @ turn_left
    wanted = torch.zeros(len(parts), config.r_a, config.r_b, dtype=torch.float64)
    wanted[:, :r_a, :r_b] = C.mT
    equal = float(torch.maximum(s[0], LEAST_MEAN * typical)) / math.sqrt(r_a * r_b)
    root = math.sqrt(equal)  # what makes A as large as B
    missed = (S - L @ (L.T @ S @ R) @ R.T).square().sum((1, 2))
    return _Experts(root * A, B / root, wanted.flatten(1), equal, missed)


def _leading(tensors: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (a, rank) of matrices (n, a, b) that stand side by side."""
    return torch.linalg.svd(tensors.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :rank]


def _turn(vector: Tensor) -> Tensor:
    """An orthogonal matrix that takes equal entries, of length one together, to a unit vector: a reflection."""
    equal = torch.full_like(vector, 1 / math.sqrt(len(vector)))
    apart = equal - vector
    length = apart.square().sum()
    identity = torch.eye(len(vector), dtype=vector.dtype)
    return identity if length < 1e-30 else identity - 2 * torch.outer(apart, apart) / length


def _report(loras: list[Lora], config: TRexConfig, fits: Mapping[str, _Fit]) -> TRexFromLoraReport:
    def shares(missed: Tensor, energy: Tensor) -> tuple[float | None, ...]:
        pairs = zip(missed.tolist(), energy.tolist(), strict=True)
        return tuple(None if whole == 0 else part / whole for part, whole in pairs)

    energy = torch.stack([fit.energy for fit in fits.values()]).sum(0)
    missed = torch.stack([fit.missed for fit in fits.values()]).sum(0)
    at_start = torch.stack([fit.missed_at_start for fit in fits.values()]).sum(0)
    return TRexFromLoraReport(
        adapters=tuple(lora.name for lora in loras),
        layout=config.expert_layout,
        errors=tuple((missed / energy).tolist()),
        start_errors=tuple((at_start / energy).tolist()),
        layers={name: shares(fit.missed, fit.energy) for name, fit in fits.items()},
        start_layers={name: shares(fit.missed_at_start, fit.energy) for name, fit in fits.items()},
    )
