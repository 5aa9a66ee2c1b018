"""What the routers of an adapter do on some data, from one pass over it.

Axis legend: B rows of a batch, T tokens of a row, N tokens that are counted, D_in a layer's input width, E experts, K
clusters, U prompts of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data_pass import Attended, Data, check_count, check_unmerged, data_pass
from ..layer import TRexLayer
from ..mixture import router_logits, weigh_experts
from ..model import TRexModel, find_peft_model, find_tuner
from ..prior.inputs import Inputs
from .figures import LayerRouting
from .report import RoutingReport
from .statistics import ClusterSums, LayerSums, RoutingParts

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
    with data_pass(tuner, adapter_name, data) as batches, recorder.attached():
        for batch in batches:
            labels = _labels(batch, group_by)
            recorder.start(Inputs.of(batch), labels)
            running(**batch)
    return recorder.report()


def routing_parts(layer: TRexLayer, adapter_name: str, x: Tensor) -> RoutingParts:
    """The routing (..., E) of a layer for its input (..., D_in), within a forward.

    The sum of the router's and the prior's part is `layer.expert_weights`.
    """
    experts, settings = layer.experts_of(adapter_name), layer.settings_of(adapter_name)
    prior = layer._prior_for(adapter_name, x, experts)
    omega = torch.sigmoid(settings.temperature * layer.trex_omega[adapter_name].float())
    p, by_token, by_prior = None, x.new_zeros(1, dtype=torch.float32), x.new_zeros(1, dtype=torch.float32)
    if experts.router is not None:
        logits = router_logits(x, experts.router, experts.router_down)
        p = weigh_experts(x, logits, None, None, settings._replace(token_scale=1.0))
        by_token = omega * settings.token_scale * p
    if prior is not None:
        by_prior = (1 - omega) * weigh_experts(x, None, prior, None, settings)
    shape = (*x.shape[:-1], max(by_token.shape[-1], by_prior.shape[-1]))
    return RoutingParts(p, by_token.expand(shape), by_prior.expand(shape))


class Rows(Attended):
    """For every layer: which tokens of the batch that runs are no padding, and the prompt that each belongs to."""

    def __init__(self, tuner: TRexModel) -> None:
        super().__init__(tuner)
        self.labels: list[str] | None = None  # (U,)
        self.count = 0
        # The prompt of each token (B, T), where a row holds several.
        self._index: Tensor | None = None
        self._rows = 0

    def start(self, inputs: Inputs, labels: list[str] | None = None) -> None:
        """Take up a batch, and the labels of its rows, or of its sequences where rows hold several."""
        super().start(inputs)
        self._index, self._rows, self.count = None, inputs.rows, inputs.rows
        tokens, mask = inputs.tokens, inputs.mask
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and (mask is None or mask.dim() == 2):
            prompts = inputs.prompts(causal=False)
            self._index, self.count = prompts.index, prompts.count
        self.labels = labels
        if labels is None or len(labels) == self.count:
            return
        if len(labels) != self._rows:
            packed = "" if self._index is None else f" that pack {self.count} sequences"
            raise ValueError(
                f"group_by gave {len(labels)} labels for a batch of {self._rows} rows{packed}; expected one a row."
            )
        assert self._index is not None
        row_of_prompt = torch.zeros(self.count, dtype=torch.long)
        row_of_prompt[self._index.flatten().cpu()] = torch.arange(self._rows).repeat_interleave(self._index.shape[1])
        self.labels = [labels[row] for row in row_of_prompt.tolist()]

    def prompts_of(self, x: Tensor) -> Tensor | None:
        """The number (...) of each token's prompt for a layer's input (..., D_in); None where that does not tell."""
        if self._index is not None:
            index = self._index.to(x.device)
            if x.shape[:-1] == index.shape:
                return index
            return index.flatten() if x.shape[:-1] == (index.numel(),) else None
        numbers = torch.arange(self._rows, device=x.device)
        if x.shape[0] == self._rows:
            return numbers.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
        if x.dim() == 2 and self._rows and x.shape[0] % self._rows == 0:
            return numbers.repeat_interleave(x.shape[0] // self._rows)
        return None


class _Recorder:
    """Sums up what the layers of an adapter do, by hooks on each layer and on the module that it adapts."""

    def __init__(self, tuner: TRexModel, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self.layers: dict[str, Any] = tuner.layers_of(adapter_name)
        self.rows, self.clusters = Rows(tuner), ClusterSums()
        self.sums = {
            name: LayerSums(
                layer.trex_A[adapter_name],
                layer.trex_B[adapter_name],
                grid=layer.trex_settings[adapter_name]["layout"] == "grid",
            )
            for name, layer in self.layers.items()
        }
        # The tokens to count in the layers that have got their input, and whose base layer has not run yet.
        self._kept: dict[str, Tensor] = {}
        # All layers see the same prompts, so the first one that can tell their clusters counts them.
        self._clusters_counted = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        with self.rows, ExitStack() as hooks:
            for name, layer in self.layers.items():
                hooks.callback(layer.register_forward_pre_hook(partial(self._before, name)).remove)
                hooks.callback(layer.base_layer.register_forward_hook(partial(self._after_base, name)).remove)
            yield

    def start(self, inputs: Inputs, labels: list[str] | None) -> None:
        self.rows.start(inputs, labels)
        self._clusters_counted = False

    def _before(self, name: str, layer: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        kept, prompts = self.rows.kept(x, layer), self.rows.prompts_of(x)
        self._kept[name] = kept
        if prompts is not None and not self._clusters_counted:
            self._count_clusters(layer, x, kept, prompts)
        A = layer.trex_A[self.adapter_name]
        x = layer._cast_input_dtype(x, A.dtype)
        parts = routing_parts(layer, self.adapter_name, x).at(kept)
        numbers = None if prompts is None else prompts[kept]
        self.sums[name].add(F.linear(x, A)[kept], parts, numbers, self.rows.labels)

    def _after_base(self, name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        kept = self._kept.get(name)
        if kept is not None and output.shape[:-1] == kept.shape:
            self.sums[name].add_base(output[kept.to(output.device)])
            del self._kept[name]

    def _count_clusters(self, layer: TRexLayer, x: Tensor, kept: Tensor, prompts: Tensor) -> None:
        """Count the prompts by their scores, which are the same for all tokens of a prompt."""
        uses_prior = layer.trex_uses_prior[self.adapter_name]
        scores = layer._channel.scores(self.adapter_name, x) if uses_prior else None
        if scores is None:
            return
        self._clusters_counted = True
        scores = scores.reshape(*scores.shape[:-1], *[1] * (x.dim() - scores.dim()), scores.shape[-1])
        scores = scores.expand(*x.shape[:-1], scores.shape[-1])[kept].float()  # (N, K)
        by_prompt = scores.new_zeros(self.rows.count, scores.shape[-1])
        by_prompt[prompts[kept]] = scores
        present = torch.zeros(self.rows.count, dtype=torch.bool, device=x.device)
        present[prompts[kept]] = True
        self.clusters.add(by_prompt, present, self.rows.labels)

    def report(self) -> RoutingReport:
        """The report on all data so far; a ValueError if no layer saw a token."""
        called = [name for name, sums in self.sums.items() if sums.tokens]
        uncalled = [name for name in self.sums if name not in called]
        if not called:
            raise ValueError("The dataloader gave no batch with a token; a report needs some.")
        if uncalled:
            warnings.warn(
                f"{len(uncalled)} adapted layers were never called on this data, such as {uncalled[0]}; they are not "
                "in the report.",
                stacklevel=3,
            )
        counts = [{label: group.prompts for label, group in self.sums[name].groups.items()} for name in called]
        groups = dict(sorted(max(counts, key=lambda prompts: sum(prompts.values())).items()))
        return RoutingReport(
            adapter_name=self.adapter_name,
            tokens=max(self.sums[name].tokens for name in called),
            layers={name: self._figures(name) for name in called},
            groups=groups,
            **self.clusters.figures(list(groups)),
        )

    def _figures(self, name: str) -> LayerRouting:
        layer, sums, adapter_name = self.layers[name], self.sums[name], self.adapter_name
        temperature = layer.trex_settings[adapter_name]["temperature"]
        omega, gate = (
            float(torch.sigmoid(temperature * logits[adapter_name].detach().double().cpu()))
            for logits in (layer.trex_omega, layer.trex_gate)
        )
        B = layer.trex_B[adapter_name].detach().to(sums.device).double()
        if not (sums.is_finite() and torch.isfinite(B).all()):
            raise ValueError(
                f"NaN or infinity came up in the layer {name}: the adapter {adapter_name!r} seems to be broken, or "
                "the model on this data."
            )
        return sums.figures(omega, gate, B.T @ B, routed=adapter_name in layer.trex_router)


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
