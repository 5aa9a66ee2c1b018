"""Static weights that are polished beyond their closed form: they learn the routed model's answers.

Axis legend: B rows, T tokens, V vocabulary, D_in and D_out a layer's widths, r_b output features, K clusters, n the
width of what a layer's static weights start from (r_a or D_in).

The closed form brings each layer's output close by itself. What counts is the model's: so all static weights are
trained together, by Adam, on the divergence KL(routed || static) of the predicted tokens. A part of the data is held
out, and the weights that do best on it are kept, those of the closed form among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..data_pass import Attended, Data, DataPass
from ..fast.base import Base
from ..layer import TRexLayer
from ..model import find_peft_model, find_tuner
from ..prior.inputs import Inputs
from ..undo import Undone

# Of so many batches one is held out; it is looked at so many times in all.
EVERY, LOOKS = 4, 8
# The first steps change a layer's output by about this share at most; the rate falls to zero.
RATE = 0.05
Statics = dict[str, Tensor]  # (1 + K, r_b, n) by the layers' names


class Polish(NamedTuple):
    """What polishing did: KL(routed || static) on the held-out part in nats for each token, before and after."""

    before: float
    after: float


def polish(
    model: nn.Module, adapter_name: str, data: Data, statics: Statics, steps: int
) -> tuple[Statics, tuple[Polish, ...]]:
    """Polish the weights for all tokens and, where there are some, those of the clusters.

    Args:
        data: a list of at least two batches.
        statics: float32, which stay as they are.
        steps: of training, each on one batch.

    Returns:
        The weights, and what polishing did to those for all tokens, and to those of the clusters.
    """
    batches: Any = data.batches
    held_out = [batch for number, batch in enumerate(batches) if number % EVERY == 1]
    trained = [batch for number, batch in enumerate(batches) if number % EVERY != 1]
    order = [trained[number % len(trained)] for number in range(steps)]
    parts = [False, True][: 1 + (len(next(iter(statics.values()))) > 1)]
    found, results = dict(statics), []
    title = data.title and f"{data.title}, polish"
    with tqdm(total=steps * len(parts), desc=title, disable=title is None) as bar:
        for by_cluster in parts:
            student = _Student(model, adapter_name, statics, by_cluster)
            best, result = _train(student, order, held_out, bar)
            results.append(result)
            for name, static in best.items():
                found[name] = torch.cat([found[name][:1], static[1:]] if by_cluster else [static[:1], found[name][1:]])
    return found, tuple(results)


def _train(student: _Student, order: list[Any], held_out: list[Any], bar: Any) -> tuple[Statics, Polish]:
    """The best weights that training comes by, and what they diverge on the held-out part."""
    before = lowest = student.diverges(held_out)
    best, trained = student.weights(), list(student.changes.values())
    optimizer = torch.optim.Adam(trained, lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(order))

    def step(wanted: Tensor, logits: Tensor) -> None:
        loss = _divergence(wanted, logits) / max(1, len(wanted))
        # A layer that this batch does not reach has no gradient.
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for change, gradient in zip(trained, gradients, strict=True):
            change.grad = gradient
        optimizer.step()
        schedule.step()
        bar.update()

    length = -(-len(order) // LOOKS)
    for start in range(0, len(order), length):
        student.compare(order[start : start + length], step, train=True)
        now = student.diverges(held_out)
        bar.set_postfix_str(f"{before:.4f} -> {now:.4f} nats")
        if now < lowest:
            best, lowest = student.weights(), now
    return best, Polish(before, lowest)


class _StandIn:
    """A block in which the layers add the output of static weights in the adapter's place."""

    def __init__(self, layers: Mapping[str, TRexLayer], add: Callable[..., Tensor]) -> None:
        self._layers, self._add = layers, add

    def __enter__(self) -> None:
        for name, layer in self._layers.items():
            vars(layer)["_add_adapter"] = partial(self._add, name, layer)

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def undo(self) -> None:
        """Have the layers add the adapter's output again."""
        for layer in self._layers.values():
            vars(layer).pop("_add_adapter", None)


class _Student:
    """The model with static weights, which its `changes` are added to, in the adapter's place."""

    def __init__(self, model: nn.Module, adapter_name: str, statics: Statics, by_cluster: bool) -> None:
        self.tuner, self.model, self.adapter_name = find_tuner(model), find_peft_model(model), adapter_name
        self.layers, self.statics, self.by_cluster = self.tuner.layers_of(adapter_name), statics, by_cluster
        # Adam changes each of a row's n weights by the same amount. A change of one for all of them is as long as
        # a row of the closed form is on average, so that wide layers move no further than narrow ones.
        self.scales = {
            name: (static.square().mean() / static.shape[-1]).sqrt().clamp(min=1e-30)
            for name, static in statics.items()
        }
        self.changes = {name: torch.zeros_like(static, requires_grad=True) for name, static in statics.items()}

    def weights(self) -> Statics:
        """The weights as they are now."""
        return {name: self._weight(name).detach().clone() for name in self.statics}

    def _weight(self, name: str) -> Tensor:
        return self.statics[name] + self.scales[name] * self.changes[name]

    def _add(self, name: str, layer: TRexLayer, adapter_name: str, base: Base) -> Tensor:
        """In the place of a layer's `_add_adapter`: the base layer's output and that of the static weights."""
        A, B, gate = (kind[adapter_name].detach() for kind in (layer.trex_A, layer.trex_B, layer.trex_gate))
        x, weight = base.x.to(A.dtype), self._weight(name).to(A.dtype)
        z = x if weight.shape[-1] == x.shape[-1] else F.linear(x, A)
        if self.by_cluster:
            cluster = layer.cluster_of(x, adapter_name)
            # Tokens without a cluster have the weights of all tokens.
            number = torch.where(cluster < len(weight) - 1, cluster + 1, 0)
            mixed = z.new_zeros(*z.shape[:-1], weight.shape[1])
            for index in number.unique().tolist():
                mixed = torch.where((number == index)[..., None], F.linear(z, weight[index]), mixed)
        else:
            mixed = F.linear(z, weight[0])
        mixed = torch.sigmoid(layer.trex_settings[adapter_name].temperature * gate) * mixed
        output = base.compute()
        return output + F.linear(mixed, B).to(output.dtype)

    def compare(self, batches: Sequence[Any], use: Callable[[Tensor, Tensor], None], train: bool = False) -> None:
        """Call `use` with the logits (N, V) of each batch's predicted tokens: the routed model's, and this one's."""
        passing, standing_in = DataPass(self.tuner, self.adapter_name, Data(batches)), _StandIn(self.layers, self._add)
        with Undone(passing, standing_in), Attended(self.tuner) as attended, passing as moved:
            for batch in moved:
                inputs = Inputs.of(batch)
                attended.start(inputs)
                wanted = self._logits(batch, inputs, attended)
                with standing_in, torch.set_grad_enabled(train):
                    use(wanted, self._logits(batch, inputs, attended))

    def _logits(self, batch: Mapping[str, Any], inputs: Inputs, attended: Attended) -> Tensor:
        output = self.model(**batch)
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"distill_steps compares logits, and the model gave a {type(output).__name__} without any; set "
                "distill_steps=0."
            )
        return logits[predicted(logits, inputs, attended, self.tuner.prompts.adapters.is_causal())].float()

    def diverges(self, batches: Sequence[Any]) -> float:
        """The mean divergence of all predicted tokens."""
        sums: list[tuple[float, int]] = []
        self.compare(batches, lambda wanted, logits: sums.append((_divergence(wanted, logits).item(), len(wanted))))
        return sum(total for total, _ in sums) / max(1, sum(count for _, count in sums))


def _divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """The sum over tokens of KL(softmax(wanted) || softmax(logits)), logits (N, V)."""
    return F.kl_div(F.log_softmax(logits, -1), F.log_softmax(wanted, -1), reduction="sum", log_target=True)


def predicted(logits: Tensor, inputs: Inputs, attended: Attended, causal: bool) -> Tensor:
    """Which logits (...) count: those of labelled tokens, else those of tokens that are no padding, else all.

    Args:
        logits: (B, T, V), or (B, V) of a model that classifies rows.
        causal: whether the logits of a token predict the next one.
    """
    everywhere = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    labels = inputs.labels
    if isinstance(labels, Tensor) and logits.dim() == 3 and labels.shape == logits.shape[:2]:
        labelled = labels != -100
        return F.pad(labelled[:, 1:], (0, 1)) if causal else labelled
    masks = [mask for mask in attended.masks if mask.shape == everywhere.shape]
    return masks[-1].to(logits.device) if masks else everywhere
