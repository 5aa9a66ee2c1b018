"""The check that every run begins with: the adapter equals the readable formula, or no speed is printed."""

from __future__ import annotations

from typing import Any

import torch
from speed.variants import (
    PRECISIONS,
    TREX,
    VARIANTS,
    OneLayer,
    Size,
    adapt,
    adapted_of,
    batch,
    make_base,
    random_prompts,
)
from torch import Tensor
from torch.nn import functional as F

from peft_trex import TRexLayer, initialize_trex_prior, rank_one_mixture
from peft_trex.model import find_tuner
from peft_trex.prior.channel import PriorChannel
from peft_trex.prior.state import ForwardState

NAMES = ("A", "B", "router", "omega", "gate", "map", "core")  # of which a layer may lack some
# relative, on top of four times what the formula itself is off in that precision
ALLOWED = {"fp32": 1e-5, "autocast": 2e-2, "autocast-bf16-base": 2e-2, "bf16": 2e-2}


class CheckFailed(Exception):
    """The adapter differs from the formula."""


@torch.no_grad()
def randomize(model: Any) -> None:
    """Parameters none of which is zero, with softmax and sigmoids far from their ends."""
    torch.manual_seed(4)
    for layer in (module for module in model.modules() if isinstance(module, TRexLayer)):
        layer.trex_B["default"].normal_()
        for router in layer.trex_router.values():
            router.normal_(std=layer.in_features**-0.5)
        for core in layer.trex_core.values():
            core.normal_(std=0.5)
        layer.trex_omega["default"].uniform_(-0.01, 0.01)
        layer.trex_gate["default"].uniform_(-0.01, 0.01)


def _tensors(layer: Any) -> dict[str, Tensor]:
    """The adapter's parameters in a layer."""
    kinds = {name: getattr(layer, f"trex_{name}") for name in NAMES}
    return {name: kind["default"] for name, kind in kinds.items() if "default" in kind}


def _prior(scores: Tensor | None, leaves: dict[str, Tensor]) -> Tensor | None:
    """The prior of each expert, (B, E), from the scores of the clusters."""
    if scores is None:
        return leaves["core"][None] if "core" in leaves else None
    scores = scores.to(leaves["A"].dtype)
    prior = F.linear(scores, leaves["map"]) if "map" in leaves else scores
    return prior + leaves["core"] if "core" in leaves else prior


def _formula(layer: Any, x: Tensor, scores: Tensor | None, precision: str, exact: bool) -> tuple[Tensor, Tensor, dict]:
    """The layer's output, the adapter's share of it, and all that has a gradient, by the formula.

    Args:
        layer: a T-REX layer.
        x: (B, T, D_in).
        scores: (B, K) of the prompts.
        precision: to compute it in.
        exact: in float64 instead.
    """
    tensors = _tensors(layer)
    dtype = torch.float64 if exact else tensors["A"].dtype
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    leaves["x"] = x.detach().to(torch.float64 if exact else x.dtype).requires_grad_()
    weight = layer.get_base_layer().weight.detach()
    with PRECISIONS["fp32" if exact else precision].context(x.device.type):
        base = F.linear(leaves["x"], weight.to(torch.float64) if exact else weight)
        added = rank_one_mixture(
            leaves["x"].to(dtype),
            leaves["A"],
            leaves["B"],
            leaves.get("router"),
            _prior(scores, leaves),
            leaves["omega"],
            leaves["gate"],
            **layer.trex_settings["default"]._asdict(),
        )
        return base + added.to(base.dtype), added, leaves


def _gradients(output: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(output, list(leaves.values()), dy.to(output.dtype))
    return {f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def check_layer(
    layer: Any,
    channel: PriorChannel,
    prior: ForwardState,
    x: Tensor,
    precision: str,
    where: str,
    backend: str | None = None,
) -> None:
    """Compare a layer's output and every gradient with the formula, in training, and in eval without gradients.

    Args:
        layer: a T-REX layer with the adapter "default" in the grid layout.
        channel: that it reads.
        prior: of the rows of x.
        x: (B, T, D_in), its input.
        precision: one of [`PRECISIONS`].
        where: the layer's name, for the message.
        backend: of torch.compile, if the layer is to be compiled.

    Raises:
        CheckFailed: naming the tensor that is off, and by how much.
    """
    context = PRECISIONS[precision].context
    scores = prior.scores["default"]
    truth, added, leaves = _formula(layer, x, scores, precision, exact=True)
    plain, _, plain_leaves = _formula(layer, x, scores, precision, exact=False)
    torch.manual_seed(5)
    # in part the adapter's own output, so that the scalars' gradients are no sums that cancel to almost nothing
    dy = (added / added.pow(2).mean().sqrt() + torch.randn_like(added)).detach().to(plain.dtype)
    wanted = {"output": truth.detach(), **_gradients(truth, leaves, dy)}
    yardstick = {"output": plain.detach(), **_gradients(plain, plain_leaves, dy)}

    def call(x: Tensor) -> Tensor:
        return channel.run(prior, layer, x)

    if backend is not None:
        torch._dynamo.reset()
        call = torch.compile(call, backend=backend)
    layer.train()
    leaves = _tensors(layer)
    leaves["x"] = x.detach().requires_grad_()
    with context(x.device.type):
        output = call(leaves["x"])
    found = {"output": output.detach(), **_gradients(output, leaves, dy)}
    layer.eval()
    with torch.no_grad(), context(x.device.type):
        for name, part in (("output in eval", x), ("output of one token in eval", x[:, -1:])):
            found[name] = call(part)
            wanted[name] = wanted["output"][:, -part.shape[1] :]
            yardstick[name] = yardstick["output"][:, -part.shape[1] :]
    for name, value in found.items():
        scale = wanted[name].norm().clamp_min(1e-30)
        off, own = (float((tensor.double() - wanted[name]).norm() / scale) for tensor in (value, yardstick[name]))
        allowed = ALLOWED[precision] + 4 * own
        if not off <= allowed:  # NaN as well
            raise CheckFailed(
                f"{where}, {precision}: the {name} is off by {off:.1e} of its norm; the formula itself is off by "
                f"{own:.1e} in this precision, and {allowed:.1e} is allowed."
            )


def check_model(size: Size, precision: str, device: str, variant: str = TREX) -> None:
    """The check of every layer of one block, with the prior and the inputs that a forward of the model gives them."""
    base = make_base(size, precision, device, layers=1)
    model = adapt(base, VARIANTS[variant](adapted_of(base)))
    initialize_trex_prior(model, random_prompts(size, device), progress=False)
    randomize(model)
    channel = find_tuner(model).prompts.channel
    seen: dict[str, tuple[Any, Tensor, ForwardState]] = {}
    handles = [
        module.register_forward_hook(
            lambda layer, args, _, name=name: seen.update({name: (layer, args[0].detach(), channel.running.state)})
        )
        for name, module in model.named_modules()
        if isinstance(module, TRexLayer)
    ]
    with PRECISIONS[precision].context(device):
        model.train()(**batch(size, device))
    for handle in handles:
        handle.remove()
    for name, (layer, x, prior) in seen.items():
        if prior.scores["default"] is None or not prior.scores["default"].any():
            raise CheckFailed(f"{name}, {precision}: the prompts' prior did not reach the layer.")
        check_layer(layer, channel, prior, x, precision, name.split(".layers.")[-1])


def make_layer(
    config: Any, rows: int, tokens: int, width: int, precision: str, device: str
) -> tuple[Any, Any, Tensor, Any]:
    """A linear layer with an adapter: its model, the layer, an input (rows, tokens, width), and how to call the layer.

    A T-REX layer is called with a random prior for every row.
    """
    torch.manual_seed(0)
    model = adapt(OneLayer(width).to(device, PRECISIONS[precision].base).requires_grad_(False), config)
    x = torch.randn(rows, tokens, width, device=device).to(PRECISIONS[precision].base)
    layer = next(module for name, module in model.named_modules() if name.endswith("proj"))
    if not isinstance(layer, TRexLayer):
        return model, layer, x, layer
    channel = find_tuner(model).prompts.channel
    scores = torch.rand(rows, config.num_clusters, device=device) * 2 - 1
    prior = ForwardState({"default": scores}, rows, frozenset({tokens}))
    return model, layer, x, lambda x: channel.run(prior, layer, x)


def check_one_layer(
    config: Any,
    rows: int,
    tokens: int,
    width: int,
    precision: str,
    device: str,
    backend: str | None = None,
) -> None:
    """The check of a layer by itself: for a point of a sweep, or compiled."""
    model, layer, x, _ = make_layer(config, rows, tokens, width, precision, device)
    randomize(model)
    scores = torch.rand(rows, config.num_clusters, device=device) * 2 - 1
    prior = ForwardState({"default": scores}, rows, frozenset({tokens}))
    where = f"layer of width {width}, {rows} x {tokens} tokens, {config.r_a} x {config.r_b} experts"
    where += f", compiled by {backend}" * (backend is not None)
    check_layer(layer, find_tuner(model).prompts.channel, prior, x, precision, where, backend)
