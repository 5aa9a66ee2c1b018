"""The semantic prior: what a prompt's embedding says about the experts, and how it reaches the layers of one forward.

Axis legend: B prompts of a batch, T tokens, d width of the embedding, K clusters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .balance import RouterLosses

if TYPE_CHECKING:
    from .steering import Steering


class SemanticPrior(nn.Module):
    """Centroids of the training prompts' embeddings, and the score of a prompt against each of them.

    `s_k = cos(e - mean, c_k)` for the prompt's embedding `e` (arXiv 2404.08985, the instance-level intuition; the
    centring is ours), or `cos(W (e - mean), c_k)` with whitening `W`. The buffers are saved and loaded with the
    adapter; all are zero until the prior is fitted.

    Args:
        num_clusters: K.
        dim: d, the embedding's width.
        whitened: p, the number of principal directions that prompts are compared along; None for all of the
            embedding, as it is.

    Raises:
        ValueError: if p is more than d.
    """

    centroids: Tensor  # (K, d), or (K, p) whitened; rows of length one
    whitening: Tensor | None  # (p, d): W
    mean: Tensor  # (d,), the training prompts' mean embedding
    mean_scores: Tensor  # (K,), the mean score of each cluster over the training prompts

    def __init__(self, num_clusters: int, dim: int, whitened: int | None = None) -> None:
        super().__init__()
        if whitened is not None and whitened > dim:
            raise ValueError(f"prior_whitening={whitened} is more than {dim}, the width of the prompts' embeddings.")
        self.register_buffer("centroids", torch.zeros(num_clusters, whitened or dim))
        self.register_buffer("whitening", torch.zeros(whitened, dim) if whitened else None)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("mean_scores", torch.zeros(num_clusters))
        self._fitted: bool | None = None
        self.register_load_state_dict_post_hook(SemanticPrior.look)

    @property
    def dim(self) -> int:
        return self.mean.shape[0]

    @property
    def fitted(self) -> bool:
        """Whether the centroids are known."""
        # what was not so may be by now: DDP, for one, copies the buffers of rank 0 over those of the others
        if not self._fitted and not torch.compiler.is_compiling():
            self.look()
        return bool(self._fitted)

    def look(self, *_: Any) -> None:
        """Read off the centroids whether they are known; on a GPU each look waits for the device."""
        self._fitted = None if self.centroids.is_meta else bool(self.centroids.any())

    @torch.no_grad()
    def set(self, centroids: Tensor, mean: Tensor, mean_scores: Tensor, whitening: Tensor | None = None) -> None:
        """Take over a finished fit, all at once."""
        self.centroids.copy_(F.normalize(centroids, dim=-1))
        if self.whitening is not None:
            assert whitening is not None
            self.whitening.copy_(whitening)
        self.mean.copy_(mean)
        self.mean_scores.copy_(mean_scores)
        self.look()

    @torch.no_grad()
    def score(self, embedding: Tensor) -> Tensor:
        """Scores (B, K) in [-1, 1], float32, of prompt embeddings (B, d)."""
        return self.score_direction(self.direction(embedding))

    @torch.no_grad()
    def direction(self, embedding: Tensor) -> Tensor:
        """What is compared with the centroids, (B, d) or (B, p), float32, of prompt embeddings (B, d)."""
        device = embedding.device
        centred = embedding.float() - self.mean.to(device).float()
        if self.whitening is None:
            return centred
        with torch.autocast(device.type, enabled=False):
            return centred @ self.whitening.to(device).float().T

    @torch.no_grad()
    def score_direction(self, direction: Tensor) -> Tensor:
        """Scores (B, K) of such directions, of any length."""
        device = direction.device
        with torch.autocast(device.type, enabled=False):
            return F.normalize(direction.float(), dim=-1) @ self.centroids.to(device).float().T

    @torch.no_grad()
    def pulled_back(self) -> Tensor:
        """(K, d), float32: the vectors whose products with `e - mean` are the scores, up to a factor of the prompt's.

        The longest has length one.
        """
        centroids = self.centroids.float()
        if self.whitening is None:
            return centroids
        with torch.autocast(centroids.device.type, enabled=False):
            vectors = centroids @ self.whitening.float()
        return vectors / vectors.norm(dim=-1).max().clamp(min=1e-30)


@dataclass(frozen=True)
class ForwardPrior:
    """The prior of one forward: for each active adapter the scores of every row, or None where they count as zero."""

    scores: Mapping[str, Tensor | None]  # (B, K) each, or (B, T, K) where a row holds several prompts
    rows: int  # B
    lengths: frozenset[int] = field(default=frozenset())  # tokens in a row, to know flattened layer inputs by
    losses: RouterLosses | None = None  # what the layers are to add to, in training

    def for_call(self, rows: int, lengths: frozenset[int]) -> ForwardPrior:
        """The same prompts for a call of `rows` rows: beams and returned sequences stand beside each other."""
        if rows == self.rows:
            return replace(self, lengths=lengths)
        if rows % self.rows:
            raise ValueError(
                f"The model was called with {rows} rows, but the prior was computed for {self.rows} prompts; expected "
                "a multiple of that (beams, or several sequences for a prompt)."
            )
        times = rows // self.rows
        scores = {
            name: None if score is None else score.repeat_interleave(times, dim=0)
            for name, score in self.scores.items()
        }
        return ForwardPrior(scores, rows, lengths)

    def kept(self) -> ForwardPrior:
        """The prior of what is generated next: a row that packs several prompts goes on with its last."""
        scores = {
            name: score[:, -1] if score is not None and score.dim() == 3 else score
            for name, score in self.scores.items()
        }
        return ForwardPrior(scores, self.rows)


class _Running(threading.local):
    """What runs now, in each thread by itself: servers call one model from several. A copy starts with nothing."""

    def __init__(self) -> None:  # for each thread anew; torch.compile goes wrong on attributes of the class
        self.prior: ForwardPrior | None = None  # of the forward
        self.owner: nn.Module | None = None  # the module whose forward it is
        self.generation: ForwardPrior | None = None  # of the generate call around it
        self.steering: Steering | None = None  # of the steer_trex block around it

    def __deepcopy__(self, memo: Any) -> _Running:
        return _Running()

    def __reduce__(self) -> Any:
        return _Running, ()


class PriorChannel:
    """The one arrow from the model down to its layers: the prior of the forward that is running now.

    A layer asks for its rows of it; outside of a forward there is none. Gradient checkpointing runs a layer again when
    its forward is over, and perhaps another one in between: `run` gives such a call the prior it had the first time.
    """

    def __init__(self, priors: nn.ModuleDict) -> None:
        self.priors = priors
        self.running = _Running()
        self.calibrated: set[str] = set()  # adapters whose layers hold static weights

    def run(self, prior: ForwardPrior | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` as part of the forward that `prior` belongs to."""
        before, self.running.prior = self.running.prior, prior
        try:
            return function(*args, **kwargs)
        finally:
            self.running.prior = before

    def fitted(self, adapter_name: str) -> bool:
        return adapter_name in self.priors and self.priors[adapter_name].fitted  # type: ignore[return-value]

    def mean_scores(self, adapter_name: str) -> Tensor | None:
        """(K,), or None while the prior is not fitted."""
        return self.priors[adapter_name].mean_scores if self.fitted(adapter_name) else None  # type: ignore[return-value]

    def scores(self, adapter_name: str, x: Tensor) -> Tensor | None:
        """Scores (B, K), (1, K) or (B, T, K) that go with a layer's input `x` (B, ..., D_in); None counts as zero."""
        running = self.running.prior
        if running is None:
            if not self.fitted(adapter_name):
                return None
            raise RuntimeError(
                "A T-REX layer ran outside of a forward of its model, so the prompt's prior is not known. Call the "
                "model itself; if an activation checkpointing other than transformers' calls the layers again, use "
                "model.activation_checkpointing_enable() instead (gradient_checkpointing_enable() before "
                "transformers 5.24)."
            )
        scores = running.scores.get(adapter_name)
        if scores is None:
            return None
        if scores.device != x.device:  # as in a model that is spread over several
            scores = scores.to(x.device)
        rows = scores.shape[0]
        if scores.dim() == 3:  # for each token its own
            if x.shape[:-1] == scores.shape[:-1]:
                return scores
            if x.dim() == 2 and x.shape[0] == rows * scores.shape[1]:
                return scores.flatten(0, 1)
        elif rows in (1, x.shape[0]):
            return scores
        elif x.dim() == 2 and any(x.shape[0] == rows * length for length in running.lengths):
            return scores.repeat_interleave(x.shape[0] // rows, dim=0)  # (B * T, D_in), row by row
        raise ValueError(
            f"A T-REX layer got an input of shape {tuple(x.shape)} in a forward of {rows} prompts; it cannot tell "
            "which prompt each row belongs to. Leave such modules (routed experts, for instance) out with "
            "exclude_modules, or set use_prior=False."
        )


class CheckpointWithPrior:
    """A checkpoint function, of transformers' activation checkpointing, whose second run sees the first's prior."""

    def __init__(self, checkpoint: Callable[..., Any], channel: PriorChannel) -> None:
        self.checkpoint = checkpoint
        self.channel = channel

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prior, channel = self.channel.running.prior, self.channel

        differentiable = torch.is_grad_enabled()

        def rerun(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if differentiable and not torch.is_grad_enabled() and prior is not None and prior.losses is not None:
                raise ValueError(
                    "Reentrant gradient checkpointing first runs layers without gradients, where balance_loss_coef "
                    "and router_z_loss_coef have no effect. Enable it with use_reentrant=False, or set both to 0."
                )
            return channel.run(prior, function, *inner_args, **inner_kwargs)

        return self.checkpoint(rerun, *args, **kwargs)
