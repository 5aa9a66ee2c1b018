"""Static weights for an input-dependent adapter: the best ones in closed form, and what they miss.

Axis legend: N tokens, D_in and D_out a layer's widths, r_a input and r_b output features, n the width of what a fit
starts from (r_a for cores, D_in for wide ones), K clusters, S sets of tokens that are summed apart.

A layer adds `gate * B m` with `m = a G`, `a = A x`, where G depends on token and prompt. The static U that misses
least of it, `E |B m - B U z|^2` for z = a or z = x, is `E[m z^T] E[z z^T]^-1`, whatever B is. What is left is a LoRA
of rank r_b or less.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import check_count, reading
from .layer import TRexLayer
from .mixture import mix_features
from .model import TRexModel, find_peft_model, find_tuner
from .spans import find_prompts

Fit = Literal["core", "input"]
# added to E[z z^T]'s diagonal, as a share of its mean: directions that no token took keep what the fit starts from
RIDGE = {"core": 1e-8, "input": 1e-4}
WIDE_BYTES = 2 << 30  # of moments (D_in, D_in) that are held at once; more layers than fit take a pass of their own


@dataclass(frozen=True)
class TRexMergeReport:
    """What `calibrate_trex_merge` found. Errors are shares of the energy that the adapter adds: 0 misses nothing.

    Attributes:
        fit: "core" or "input".
        tokens: number of tokens that were seen.
        ridge: what was added to the diagonal of the second moments, as a share of its mean.
        layers: for each layer, E |adapter - static|^2 / E |adapter|^2 over the tokens that were seen.
        error: the same for all layers together, each counting by the energy that it adds.
        mean_routing_error: the same for the mean routing, which merging uses without a calibration.
        cluster_error: the same if each prompt gets the static weights of its cluster; None without `per_cluster`.
        cluster_tokens: tokens of each of the K clusters; empty without `per_cluster`. One without any has the weights
            of all tokens.
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
        ranked = sorted(self.layers, key=lambda name: self.layers[name])
        median, worst = ranked[len(ranked) // 2], ranked[-1]
        text = (
            f"T-REX merge ({self.fit}, {self.tokens} tokens): misses {self.error:.2%} of what the adapter adds, the "
            f"mean routing {self.mean_routing_error:.2%}; median layer {self.layers[median]:.2%}, worst "
            f"{self.layers[worst]:.2%} ({worst})"
        )
        if self.cluster_error is not None:
            empty = sum(count == 0 for count in self.cluster_tokens)
            text += f"; one for each of {len(self.cluster_tokens)} clusters ({empty} without tokens): "
            text += f"{self.cluster_error:.2%}"
        return text


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

    An adapter whose routing depends on its input equals no static weight. This runs the model over data, sums up the
    second moments of each layer's features, and solves for the static weights that miss least of the layer's output
    (least squares, in closed form). They are stored with the adapter, which saves and loads them; `merge_adapter`,
    `merge_and_unload`, `get_delta_weight` and PEFT's `convert_to_lora` use them from then on instead of the mean
    routing. Training the adapter again (a forward in train mode) drops them. The adapter is touched only when all is
    done.

    Args:
        model: a model with a T-REX adapter, which is not merged.
        dataloader: batches as the model's forward takes them, of the kind that the merged model will see; a few
            thousand tokens do for "core", many times the layers' width for "input". With labels, the prompt is told
            from the answer as in training. Padding does not count. torch's random state is left as it was.
        adapter_name: the adapter.
        per_cluster: fit the tokens of each cluster of prompts besides those of all, for [`save_trex_as_lora`]. A
            cluster is drawn to the weights of all tokens as if it had seen n tokens more of them, with n = r_a, or
            D_in for "input".
        fit: "core" finds the best (r_b, r_a) matrix between A and B, and keeps a few hundred numbers for each layer in
            memory and in the adapter's file. "input" finds the best (r_b, D_in) matrix before B, which may leave A's
            span. It sums up (D_in, D_in) moments for each layer, K + 1 times as many with `per_cluster`, and reads the
            data once for every 2 GB of them.
        max_batches: stop after this many batches; None reads all.
        progress: show a progress bar.

    Returns:
        A report: the relative error of each layer and of all together, in closed form.

    Raises:
        ValueError, TypeError: if there is no such adapter, it is merged, `per_cluster` has no fitted prior to go by,
            the data have fewer tokens than r_a, or the adapter or the data make NaN.
    """
    tuner = find_tuner(model)
    config = tuner.config_of(adapter_name)
    check_count("max_batches", max_batches)
    if fit not in RIDGE:
        raise ValueError(f"fit={fit!r} is unknown; use 'core' or 'input'.")
    prior = tuner.prior_of(adapter_name)
    if per_cluster and (prior is None or not prior.fitted):
        found = "is not fitted" if config.use_prior else "is switched off (use_prior=False)"
        raise ValueError(f"per_cluster=True goes by the clusters of the prior, which {found}; set per_cluster=False.")
    layers = {
        name: module
        for name, module in tuner.model.named_modules()
        if isinstance(module, TRexLayer) and adapter_name in module.trex_A
    }
    if any(layer.merged for layer in tuner.modules() if isinstance(layer, BaseTunerLayer)):
        raise ValueError("An adapter is merged into the model; call unmerge_adapter() before the calibration.")
    clusters = config.num_clusters if per_cluster else 0
    groups = list(_groups(layers, 1 + clusters, wide=fit == "input"))
    if len(groups) > 1 and isinstance(dataloader, Iterator):
        raise ValueError(
            f"fit='input' reads the data {len(groups)} times for this model, but the dataloader is an iterator, which "
            "can be read once; give a DataLoader or a list of batches, or use fit='core'."
        )
    fits: dict[str, _LayerFit] = {}
    running = find_peft_model(model)
    with only_adapter(tuner, adapter_name), uncompiled():  # hooks have no place in a compiled graph
        for group in groups:
            moments = _gather(running, tuner, group, adapter_name, clusters, fit, dataloader, max_batches, progress)
            for name, layer in group.items():
                fits[name] = _fit(name, layer, adapter_name, moments.pop(name), fit)
    report = _report(fits, fit, clusters)
    for name, layer in layers.items():
        layer.keep_static(adapter_name, fits[name].static)
    return report


@dataclass
class Moments:
    """Float64 sums over the tokens of S sets: z z^T (S, n, n), m z^T (S, r_b, n), m m^T (S, r_b, r_b), tokens (S,)."""

    zz: Tensor
    mz: Tensor
    mm: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, sets: int, n: int, r_b: int, device: torch.device) -> Moments:
        shapes = ((sets, n, n), (sets, r_b, n), (sets, r_b, r_b), (sets,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, z: Tensor, m: Tensor, sets: Tensor) -> None:
        """Count tokens in: z (N, n), m (N, r_b), and the set (N,) that each belongs to."""
        self.tokens.index_add_(0, sets, torch.ones_like(sets, dtype=torch.float64))
        for total, left, right in ((self.zz, z, z), (self.mz, m, z), (self.mm, m, m)):
            if left.shape[1] * right.shape[1] <= 1024:  # narrow: there is room for every token's own product
                total.index_add_(0, sets, left.double()[:, :, None] * right.double()[:, None, :])
                continue
            dtype = torch.promote_types(z.dtype, torch.float32)  # float64 products of this size would take most time
            for index in sets.unique().tolist():
                chosen = sets == index
                total[index] += left[chosen].to(dtype).T @ right[chosen].to(dtype)

    def of(self, index: int | None = None) -> Moments:
        """Those of one set, or of all tokens, without the axis S."""
        parts = (self.zz, self.mz, self.mm, self.tokens)
        return Moments(*(part.sum(0) if index is None else part[index] for part in parts))

    def project(self, A: Tensor) -> Moments:
        """Those of `A z` in the place of z, for A (r_a, n)."""
        return Moments(A @ self.zz @ A.T, self.mz @ A.T, self.mm, self.tokens)

    def solve(self, start: Tensor, pull: Tensor) -> Tensor:
        """The U (r_b, n) that minimises `sum |m - U z|^2 + tr((U - start) pull (U - start)^T)`."""
        return start + torch.linalg.solve(self.zz + pull, self.mz - start @ self.zz, left=False)

    def missed(self, U: Tensor, BB: Tensor) -> float:
        """Sum over the tokens of |B m - B U z|^2, with BB = B^T B."""
        cross = U @ self.mz.T
        return max(0.0, (BB * (self.mm - cross - cross.T + U @ self.zz @ U.T)).sum().item())


@dataclass
class _LayerFit:
    static: Tensor  # (1 or 1 + K, r_b, n)
    tokens: Tensor  # (S,)
    energy: float
    missed: float
    missed_by_mean: float
    missed_by_clusters: float


def _fit(name: str, layer: TRexLayer, adapter_name: str, moments: Moments, fit: Fit) -> _LayerFit:
    A, B = (parameters[adapter_name].detach().to(moments.zz) for parameters in (layer.trex_A, layer.trex_B))
    temperature = layer.trex_settings[adapter_name]["temperature"]
    gate = torch.sigmoid(temperature * layer.trex_gate[adapter_name].detach().to(B))
    BB = gate**2 * (B.T @ B)
    start = layer.mean_core(adapter_name).to(A)
    everything = moments.of()
    if not all(torch.isfinite(part).all() for part in (everything.zz, everything.mm, start, BB)):
        raise ValueError(
            f"NaN or infinity came up in the layer {name}: the adapter {adapter_name!r} seems to be broken, or the "
            "model on this data. Nothing was stored."
        )
    tokens = int(everything.tokens)
    if 0 < tokens < A.shape[0]:
        raise ValueError(
            f"The layer {name} saw {tokens} tokens, fewer than the adapter has input vectors (r_a={A.shape[0]}); a "
            "fit needs many times as many. Give more batches. Nothing was stored."
        )
    core = everything.project(A) if fit == "input" else everything
    best = core.solve(start, ridge_of(core.zz, "core"))
    pull = ridge_of(everything.zz, fit)
    if fit == "input":
        start, best = start @ A, everything.solve(best @ A, pull)
    statics, missed_by_clusters = [best], 0.0
    if len(moments.tokens) > 1:
        few = pull + everything.zz * (len(everything.zz) / max(1, tokens))  # n tokens' worth of all that were seen
        for index in range(len(moments.tokens) - 1):
            own = moments.of(index)
            statics.append(own.solve(best, few))
            missed_by_clusters += own.missed(statics[-1], BB)
        missed_by_clusters += moments.of(-1).missed(best, BB)
    static = torch.stack(statics)
    if fit == "core" and A.shape[0] == A.shape[1]:  # its width would not tell it from a wide one, so it becomes one
        static = static @ A
    return _LayerFit(
        static.float(),
        moments.tokens,
        (BB * everything.mm).sum().item(),
        everything.missed(best, BB),
        everything.missed(start, BB),
        missed_by_clusters,
    )


def ridge_of(zz: Tensor, fit: Fit) -> Tensor:
    scale = zz.diagonal().mean()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return RIDGE[fit] * scale * torch.eye(len(zz), dtype=zz.dtype, device=zz.device)


def _report(fits: Mapping[str, _LayerFit], fit: Fit, clusters: int) -> TRexMergeReport:
    seen = {name: found for name, found in fits.items() if found.tokens.any()}
    if not seen:
        raise ValueError("The dataloader gave no batch with a token; a calibration needs some. Nothing was stored.")
    if len(seen) < len(fits):
        unseen = [name for name in fits if name not in seen]
        warnings.warn(
            f"{len(unseen)} adapted layers were never called on this data, such as {unseen[0]}; they keep their mean "
            "routing, and are not in the report.",
            stacklevel=3,
        )
    energy = sum(found.energy for found in seen.values()) or 1.0  # an adapter that adds nothing misses nothing
    tokens = max((found.tokens for found in seen.values()), key=lambda counts: int(counts.sum()))
    return TRexMergeReport(
        fit,
        int(tokens.sum()),
        RIDGE[fit],
        {name: found.missed / (found.energy or 1.0) for name, found in seen.items()},
        sum(found.missed for found in seen.values()) / energy,
        sum(found.missed_by_mean for found in seen.values()) / energy,
        sum(found.missed_by_clusters for found in seen.values()) / energy if clusters else None,
        tuple(int(count) for count in tokens[:clusters]),
    )


def _groups(layers: Mapping[str, TRexLayer], sets: int, wide: bool) -> Iterator[dict[str, TRexLayer]]:
    """The layers in parts whose moments can be held at once."""
    group: dict[str, TRexLayer] = {}
    held = 0
    for name, layer in layers.items():
        size = sets * layer.in_features**2 * 8 if wide else 0
        if group and held + size > WIDE_BYTES:
            yield group
            group, held = {}, 0
        group[name] = layer
        held += size
    yield group


@contextmanager
def only_adapter(tuner: TRexModel, adapter_name: str) -> Iterator[None]:
    """This adapter alone active and enabled, all modules in eval mode; everything as it was in the end."""
    active = list(tuner.active_adapters)
    disabled = any(layer.disable_adapters for layer in tuner.modules() if isinstance(layer, BaseTunerLayer))
    trained = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    training = [(module, module.training) for module in tuner.modules()]
    try:
        tuner.eval()
        tuner.set_adapter(adapter_name)
        tuner.enable_adapter_layers()
        yield
    finally:
        tuner.set_adapter(active)
        if disabled:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's, on biases that are trained, has been heard
                tuner.disable_adapter_layers()
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag


def uncompiled() -> AbstractContextManager[Any]:
    """While this is open, modules that were compiled in place run as they were written."""
    # torch 2.5 has no such switch, and says itself what it cannot compile
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


def _gather(
    running: nn.Module,
    tuner: TRexModel,
    layers: Mapping[str, TRexLayer],
    adapter_name: str,
    clusters: int,
    fit: Fit,
    dataloader: Iterable[Mapping[str, Any]],
    max_batches: int | None,
    progress: bool,
) -> dict[str, Moments]:
    """The moments of these layers over the data: of each cluster and, last, of what has none."""
    moments: dict[str, Moments] = {}
    reading_now = Attended(tuner)

    def counting(layer: TRexLayer, sums: Moments) -> Callable[[nn.Module, tuple], None]:
        A, layout = layer.trex_A[adapter_name], layer.trex_settings[adapter_name]["layout"]

        def count(_: nn.Module, args: tuple) -> None:
            x = layer._cast_input_dtype(args[0], A.dtype)
            a = F.linear(x, A)
            m = mix_features(a, layer.expert_weights(x, adapter_name), layout)
            z = x if fit == "input" else a
            sets = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
            if clusters:
                sets = sets + layer.cluster_of(x, adapter_name)
            kept = reading_now.kept(args[0], layer)
            sums.add(*(part[kept].to(sums.zz.device) for part in (z, m, sets)))

        return count

    handles = []
    for name, layer in layers.items():
        A, B = layer.trex_A[adapter_name], layer.trex_B[adapter_name]
        device = torch.device("cpu") if A.device.type == "mps" else A.device  # which has no float64
        moments[name] = Moments.zeros(1 + clusters, A.shape[1 if fit == "input" else 0], B.shape[1], device)
        assert isinstance(layer, nn.Module)
        handles.append(layer.register_forward_pre_hook(counting(layer, moments[name])))
    embedding = tuner.input_embedding()
    home = next(tuner.parameters()).device if embedding is None else embedding.weight.device
    try:
        with torch.no_grad(), reading(dataloader, max_batches, progress, "T-REX merge") as batches:
            for batch in batches:
                if not isinstance(batch, Mapping):
                    raise TypeError(
                        f"The dataloader gave a {type(batch).__name__}; expected a mapping such as "
                        "{'input_ids': ...}."
                    )
                batch = {key: part.to(home) if isinstance(part, Tensor) else part for key, part in batch.items()}
                reading_now.start(batch)
                running(**batch)
    finally:
        for handle in (*handles, *reading_now.handles):
            handle.remove()
    return moments


class Attended:
    """Which tokens of the batch that runs are no padding, for each layer that sees them."""

    def __init__(self, tuner: TRexModel) -> None:
        base: Any = tuner.model
        self.handles: list[Any] = []
        self.encoder: Any = None
        self.encoded: Tensor | None = None  # what the encoder gave, which cross-attention reads in the decoder
        self.masks: list[Tensor] = []  # of the input, or of the encoder's; and of the decoder's
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            self.encoder = base.get_encoder()
            self.handles.append(self.encoder.register_forward_hook(self._keep))

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.encoded = output[0]

    def start(self, batch: Mapping[str, Any]) -> None:
        tokens, mask, labels = batch.get("input_ids"), batch.get("attention_mask"), batch.get("labels")
        if tokens is None and isinstance(embeds := batch.get("inputs_embeds"), Tensor):
            tokens = embeds[..., 0]
        encoded = batch.get("encoder_outputs")  # which come instead of a run of the encoder
        self.encoded = None if encoded is None else encoded[0]
        self.masks = [mask > 0] if isinstance(mask, Tensor) and mask.dim() == 2 else []
        if mask is None and isinstance(tokens, Tensor) and tokens.dim() == 2:  # packed rows may be filled up
            self.masks = [find_prompts(tokens, None, None, batch.get("position_ids")).mask]
        if self.encoder is None:
            return
        decoded = batch.get("decoder_attention_mask")
        if decoded is None and isinstance(labels, Tensor):  # which the decoder reads one place to the right
            decoded = labels != -100
        if decoded is None and (read := batch.get("decoder_input_ids")) is not None:
            decoded = torch.ones_like(read)
        if decoded is not None:
            self.masks.append(decoded > 0)

    def kept(self, x: Tensor, layer: Any) -> Tensor:
        """(...), bool, for a layer's input `x` (..., D_in); all of it where no mask has its axes."""
        masks = self.masks
        if self.encoder is not None:
            of_encoder = x is self.encoded or any(layer is module for module in self.encoder.modules())
            masks = self.masks if of_encoder else self.masks[::-1]
        for mask in masks:
            if x.shape[:-1] == mask.shape:
                return mask.to(x.device)
            if x.dim() == 2 and x.shape[0] == mask.numel():
                return mask.to(x.device).flatten()
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
