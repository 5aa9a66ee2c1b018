"""What the routers of a trained T-REX adapter do: whether they choose, whether they tell tasks apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from corpora import Row
from scoring import Texts
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from peft_trex import TRexLayer


@torch.no_grad()
def diagnose(model: Any, texts: Texts, rows: Sequence[Row], most: int = 128, batch_rows: int = 16) -> dict[str, Any]:
    """Look at the routing on some rows' prompts.

    Returns:
        omega, gate: of each layer, in [0, 1].
        token_entropy: of each layer, the token router's mean entropy relative to log E: 1 is uniform, 0 one expert.
            None without a router.
        token_share: of each layer, the token router's share of the experts' weights (of their absolute values).
        task_share: of each layer, the share of the variance of a prompt's mean expert weights that lies between tasks.
        core_rank: of each layer, how many directions the experts' weights mix, mean over tokens: the effective rank
            tr(GG')^2 / tr(GG'GG') of a token's weights G (r_a, r_b). 1 where all experts weigh alike, since their sum
            then has rank one; at most min(r_a, r_b). None in the paired layout.
        prior_spread: standard deviation of a prompt's cluster scores, mean over the prompts.
        purity, nmi: of the prompts' clusters against their tasks. None without a prior.
    """
    model.eval()
    rows = list(rows)[:most]
    layers = [module for module in model.modules() if isinstance(module, TRexLayer)]
    seen: dict[TRexLayer, list[tuple[Tensor, ...]]] = {layer: [] for layer in layers}
    scores: list[Tensor] = []
    attended = torch.empty(0)

    def look(layer: TRexLayer, args: tuple[Any, ...]) -> None:
        # where the prompt is padding, nothing counts
        seen[layer].append(_look(layer, args[0], attended))
        if layer is layers[0] and layer.trex_uses_prior["default"]:
            scores.append(layer._channel.scores("default", args[0]).float().cpu())

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        for start in range(0, len(rows), batch_rows):
            part = rows[start : start + batch_rows]
            examples = [{"prompt": texts.prompt(row), "completion": ()} for row in part]
            examples = [one | extra for one, extra in zip(examples, texts.embeddings(part), strict=True)]
            batch = {key: value.to(model.device) for key, value in texts.collate(examples).items()}
            attended = batch["attention_mask"].float()
            texts.logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    tasks = [row["task"] for row in rows]
    temperature = layers[0].trex_settings["default"]["temperature"]
    found: dict[str, Any] = {
        name: [
            _round(torch.sigmoid(temperature * getattr(layer, f"trex_{name}")["default"].float())) for layer in layers
        ]
        for name in ("omega", "gate")
    }
    by_layer = [[torch.cat(values) for values in zip(*seen[layer], strict=True)] for layer in layers]
    routed = "default" in layers[0].trex_router
    found["token_entropy"] = [_round(entropy.mean()) for entropy, *_ in by_layer] if routed else None
    found["token_share"] = [_round(share.mean()) for _, share, *_ in by_layer]
    found["task_share"] = [_round(_between(weights, tasks)) for *_, weights in by_layer]
    grid = layers[0].trex_settings["default"]["layout"] == "grid"
    found["core_rank"] = [_round(rank.mean()) for _, _, rank, _ in by_layer] if grid else None
    if not scores:
        return {**found, "prior_spread": None, "purity": None, "nmi": None}
    all_scores = torch.cat(scores)
    clusters = all_scores.argmax(-1).tolist()
    return {
        **found,
        "prior_spread": _round(all_scores.std(-1).mean()),
        "purity": round(_purity(clusters, tasks), 4),
        "nmi": round(float(normalized_mutual_info_score(tasks, clusters)), 4),
    }


def _look(layer: TRexLayer, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each prompt, means over its tokens.

    They are the router's relative entropy (B,), its share (B,), the core's rank (B,) and the expert weights (B, E).
    """
    count = attended.sum(1).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        mask = attended if values.dim() == 2 else attended[..., None]
        return ((values * mask).sum(1) / (count if values.dim() == 2 else count[:, None])).cpu()

    weights = layer.expert_weights(x).float()
    settings = layer.trex_settings["default"]
    router, down, prior = layer._routing("default", x)
    omega = torch.sigmoid(settings["temperature"] * layer.trex_omega["default"].float())
    rank = torch.ones_like(attended)
    if settings["layout"] == "grid":
        core = weights.unflatten(-1, (layer.trex_A["default"].shape[0], -1))
        gram = core @ core.mT
        rank = gram.diagonal(dim1=-2, dim2=-1).sum(-1).square() / gram.square().sum((-2, -1)).clamp(min=1e-30)
    if router is None:
        return torch.zeros(len(x)), torch.zeros(len(x)), mean(rank), mean(weights)
    with torch.autocast(x.device.type, enabled=False):
        logits = x.float() @ (router if down is None else router @ down).float().T
    p = logits.softmax(-1)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1) / torch.tensor(float(p.shape[-1])).log()
    by_token = (omega * settings["token_scale"] * p).sum(-1)
    by_prior = torch.zeros_like(by_token)
    if prior is not None:
        known = ((1 - omega) * settings["prior_scale"] * prior.float()).abs().sum(-1)
        by_prior = by_prior + (known[:, None] if known.dim() == 1 else known)
    return mean(entropy), mean(by_token / (by_token + by_prior)), mean(rank), mean(weights)


def _between(values: Tensor, tasks: list[str]) -> Tensor:
    """Share of the variance of values (N, E) that lies between the tasks, in [0, 1]."""
    centred = values - values.mean(0)
    index = torch.tensor([sorted(set(tasks)).index(task) for task in tasks])
    between = sum(
        len(own) * own.mean(0).square().sum() for number in index.unique() for own in [centred[index == number]]
    )
    return between / centred.square().sum().clamp(min=1e-30)


def _purity(clusters: list[int], tasks: list[str]) -> float:
    """Share of the prompts whose task is the commonest in their cluster."""
    members: dict[int, list[str]] = {}
    for cluster, task in zip(clusters, tasks, strict=True):
        members.setdefault(cluster, []).append(task)
    return sum(max(own.count(task) for task in set(own)) for own in members.values()) / len(tasks)


def _round(value: Tensor) -> float:
    return round(float(value), 4)
