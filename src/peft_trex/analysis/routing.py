"""What the routers of an adapter do on some data, from one pass over it.

Axis legend: B rows of a batch, T tokens of a row, N tokens that are counted, D_in a layer's input width, E experts, K
clusters, U prompts of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data_pass import Attended, Data, DataPass, check_count, check_unmerged
from ..mixture import router_logits, weigh_experts
from ..model import TRexModel, find_peft_model, find_tuner
from ..prior.inputs import Inputs
from ..undo import Undone
from .figures import layers_before
from .report import RoutingReport
from .statistics import ClusterSums, LayerSums

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
    check_unmerged(tuner, "its routing is looked at")
    running, recorder = find_peft_model(model), _Recorder(tuner, adapter_name)
    data = Data(dataloader, max_batches, "T-REX routing" if progress else None)
    passing = DataPass(tuner, adapter_name, data)
    with Undone(passing), passing as batches, recorder:
        for batch in batches:
            labels = _labels(batch, group_by)
            recorder.start(Inputs.of(batch), labels)
            running(**batch)
    return recorder.report()


def routing_parts(layer: Any, adapter_name: str, x: Tensor, kept: Tensor) -> list[Tensor]:
    """The routing of the tokens that a mask (...) keeps of a layer's input (..., D_in), within a forward.

    It is the router's probabilities (N, E), zero without a router, and the router's and the prior's part of the
    experts' weights (N, E), whose sum is `layer.expert_weights`.
    """
    experts, settings = layer.experts_of(adapter_name), layer.trex_settings[adapter_name]
    x = layer._cast_input_dtype(x, experts.A.dtype)
    prior = layer._prior_for(adapter_name, x, experts)
    omega = torch.sigmoid(settings.temperature * experts.omega.float())
    p = by_prior = x.new_zeros(1, dtype=torch.float32)
    if experts.router is not None:
        logits = router_logits(x, experts.router, experts.router_down)
        p = weigh_experts(x, logits, None, None, settings._replace(token_scale=1.0))
    if prior is not None:
        by_prior = (1 - omega) * weigh_experts(x, None, prior, None, settings)
    by_token = omega * settings.token_scale * p
    shape = (*x.shape[:-1], max(p.shape[-1], by_prior.shape[-1]))
    return [values.expand(shape)[kept] for values in (p, by_token, by_prior)]


class _Recorder(Attended):
    """Sums up what the layers of an adapter do, by hooks on each layer and on the module that it adapts."""

    # These are the labels of the running batch's prompts, and the number of each row's prompt (B,), or of each
    # token's (B, T) where rows hold several.
    labels: list[str] | None
    numbers: Tensor
    # All layers see the same prompts, so the first one that can tell their clusters counts them.
    clusters_counted: bool

    def __init__(self, tuner: TRexModel, adapter_name: str) -> None:
        super().__init__(tuner)
        self.adapter_name = adapter_name
        self.sums = {name: LayerSums(layer, adapter_name) for name, layer in tuner.layers_of(adapter_name).items()}
        self.clusters = ClusterSums()
        # The loads of the batch that runs, with their mask, until the layer of the kind in the next block takes them.
        self.before = layers_before(self.sums)
        self.loads: dict[str, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> _Recorder:
        super().__enter__()
        self.callback(self.loads.clear)
        for name, sums in self.sums.items():
            layer = sums.layer
            self.callback(layer.register_forward_pre_hook(partial(self._before, name, sums)).remove)
            self.callback(layer.base_layer.register_forward_hook(partial(self._after_base, sums)).remove)
        return self

    def start(self, inputs: Inputs, labels: list[str] | None = None) -> None:
        """Take up a batch, and the labels of its rows, or of its sequences where rows hold several."""
        super().start(inputs)
        self.clusters_counted = False
        self.loads.clear()
        rows = count = inputs.rows
        self.labels, self.numbers, packed = labels, torch.arange(rows), ""
        prompts = inputs.packed_prompts(rows)
        if prompts is not None and prompts.sequence is not None:
            count = prompts.sequences
            self.numbers, packed = prompts.sequence, f" that pack {count} sequences"
        if labels is None or len(labels) == count:
            return
        if len(labels) != rows:
            raise ValueError(
                f"group_by gave {len(labels)} labels for a batch of {rows} rows{packed}; expected one a row."
            )
        # The numbers rise, and padding has that of the sequence before it, so a sequence begins where its first is.
        begins = torch.searchsorted(self.numbers.flatten(), torch.arange(count, device=self.numbers.device))
        self.labels = [labels[row] for row in (begins // self.numbers.shape[1]).tolist()]

    def _prompts_of(self, x: Tensor, layer: Any) -> Tensor | None:
        """The number (...) of each token's prompt for a layer's input (..., D_in); None where that does not tell."""
        numbers, axes = self.numbers.to(x.device), x.shape[:-1]
        if layer.order is not None and layer.order.is_turned(x, len(numbers)):
            numbers = numbers.T if numbers.dim() == 2 else numbers.expand(axes)
        if axes[: numbers.dim()] == numbers.shape:
            return numbers.reshape(*numbers.shape, *[1] * (len(axes) - numbers.dim())).expand(axes)
        if len(axes) == 1 and axes[0] % numbers.numel() == 0:
            return numbers.flatten().repeat_interleave(axes[0] // numbers.numel())
        return None

    def _before(self, name: str, sums: LayerSums, layer: Any, args: tuple[Tensor, ...]) -> None:
        x = layer.tokens_of(args[0])
        kept, prompts = self.kept(x, layer), self._prompts_of(x, layer)
        sums.kept = kept
        if prompts is not None:
            prompts = prompts[kept]
            self._count_clusters(layer, x, kept, prompts)
        A = layer.trex_A[self.adapter_name]
        a = F.linear(layer._cast_input_dtype(x, A.dtype), A)[kept]
        load = sums.add(a, routing_parts(layer, self.adapter_name, x, kept), prompts, self.labels)
        mask, before = self.loads.pop(self.before.get(name, ""), (None, load))
        # Rows of tokens are the same in both layers; what is flattened may be any choice of them.
        if mask is not None and kept.dim() > 1 and torch.equal(mask.to(kept.device), kept):
            sums.pair(before, load)
        self.loads[name] = kept, load

    def _after_base(self, sums: LayerSums, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if sums.kept is not None:
            output = sums.layer.outputs_of(output)
            sums.base += output[sums.kept.to(output.device)].float().square().sum().to(sums.base)
            sums.kept = None

    def _count_clusters(self, layer: Any, x: Tensor, kept: Tensor, prompts: Tensor) -> None:
        """Count the prompts by their scores, which are the same for all tokens of a prompt."""
        if self.clusters_counted or not layer.trex_uses_prior[self.adapter_name]:
            return
        scores = layer.scores_of(self.adapter_name, x)
        if scores is None:
            return
        self.clusters_counted = True
        scores = scores.reshape(*scores.shape[:-1], *[1] * (x.dim() - scores.dim()), scores.shape[-1])
        scores = scores.expand(*x.shape[:-1], scores.shape[-1])[kept].float()  # (N, K)
        numbers, places = prompts.unique(return_inverse=True)
        by_prompt = scores.new_zeros(len(numbers), scores.shape[-1])
        by_prompt[places] = scores
        self.clusters.add(by_prompt, [None if self.labels is None else self.labels[n] for n in numbers.tolist()])

    def report(self) -> RoutingReport:
        """The report on all data so far; a ValueError if no layer saw a token."""
        called = {name: sums for name, sums in self.sums.items() if sums.tokens}
        uncalled = [name for name in self.sums if name not in called]
        if not called:
            raise ValueError("The dataloader gave no batch with a token; a report needs some.")
        if uncalled:
            warnings.warn(
                f"{len(uncalled)} adapted layers were never called on this data, such as {uncalled[0]}; they are not "
                "in the report.",
                stacklevel=3,
            )
        groups = max((sums.prompts() for sums in called.values()), key=lambda prompts: sum(prompts.values()))
        return RoutingReport(
            adapter_name=self.adapter_name,
            tokens=max(sums.tokens for sums in called.values()),
            layers={name: sums.figures(name) for name, sums in called.items()},
            groups=groups,
            **self.clusters.figures(list(groups)),
        )


def _labels(batch: dict[str, Any], group_by: GroupBy | None) -> list[str] | None:
    """The label of each row or sequence; a named column is taken out of the batch."""
    if group_by is None:
        return None
    if callable(group_by):
        labels: Any = group_by(batch)
    elif group_by not in batch:
        raise ValueError(f"A batch has no column {group_by!r} to group by; it has {sorted(batch)}.")
    else:
        labels = batch.pop(group_by)
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    if isinstance(labels, str) or not isinstance(labels, Sequence) or any(isinstance(row, list) for row in labels):
        raise TypeError(f"group_by gave a {type(labels).__name__}; expected a list of one label for each row.")
    return [str(label) for label in labels]
