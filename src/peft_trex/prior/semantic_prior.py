"""The semantic prior: what a prompt's embedding says about the experts.

Axis legend: B prompts of a batch, d width of the embedding, K clusters, p directions if whitened.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..undo import Snapshot, Undone, copies
from .token_rows import TOKEN_IDS, TOKEN_ROWS, replace_rows

# The name of a tensor that only some priors have, in a prior and in an adapter's file.
CELLS = "cells"
# A prior may lack these, and only its file tells how large they are.
OPTIONAL = (CELLS, TOKEN_IDS, TOKEN_ROWS)


class SemanticPrior(nn.Module):
    """Centroids of the training prompts' embeddings, and the score of a prompt against each of them.

    `s_k = cos(e - mean, c_k)` for the prompt's embedding `e` (arXiv 2404.08985, the instance-level intuition; the
    centring is ours), or `cos(W (e - mean), c_k)` with whitening `W`. The buffers are saved and loaded with the
    adapter; all are zero until the prior is fitted. A prior that was loaded onto another token embedding than the one
    that it was fitted on keeps the rows that differ.

    Args:
        num_clusters: K.
        dim: d, the embedding's width.
        whitened: p, the number of principal directions that prompts are compared along; None for all of the
            embedding, as it is. "auto" makes p the smaller of K and d; where the training prompts vary in fewer
            directions, the other rows of the whitening stay zero, so that no shape hangs on the data.

    Raises:
        ValueError: if p is more than d.
    """

    centroids: Tensor  # (K, d), or (K, p) whitened; rows of length one
    whitening: Tensor | None  # (p, d)
    mean: Tensor  # (d,)
    mean_scores: Tensor  # (K,)
    cells: Tensor | None  # (m, K), of length one: finer groups than the clusters, which a calibration asked for
    token_ids: Tensor | None  # (n,), rising
    token_rows: Tensor | None  # (n, d)

    def __init__(self, num_clusters: int, dim: int, whitened: int | Literal["auto"] | None = None) -> None:
        super().__init__()
        self.fewer_directions = whitened == "auto"
        for name, shape in self.shapes(num_clusters, dim, whitened).items():
            self.register_buffer(name, torch.zeros(shape) if math.prod(shape) else None)
        for name in OPTIONAL:
            self.register_buffer(name, None)
        self._fitted: bool | None = None
        self.register_load_state_dict_pre_hook(SemanticPrior._make_room)
        self.register_load_state_dict_post_hook(SemanticPrior.look)

    @staticmethod
    def shapes(num_clusters: int, dim: int, whitened: int | Literal["auto"] | None) -> dict[str, tuple[int, ...]]:
        """The shapes of the buffers of such a prior; an empty one for a buffer that it does not have.

        Raises:
            ValueError: if p is more than d.
        """
        directions = min(num_clusters, dim) if whitened == "auto" else whitened
        if directions is not None and directions > dim:
            raise ValueError(f"prior_whitening={directions} is more than {dim}, the width of the prompts' embeddings.")
        return {
            "centroids": (num_clusters, directions or dim),
            "whitening": (directions or 0, dim),
            "mean": (dim,),
            "mean_scores": (num_clusters,),
        }

    @property
    def dim(self) -> int:
        """The width d of the embedding."""
        return self.mean.shape[0]

    @property
    def fitted(self) -> bool:
        """Whether the centroids are known."""
        # DDP copies the buffers of rank 0 to the other ranks, so an unfitted prior may have become a fitted one.
        if not self._fitted and not torch.compiler.is_compiling():
            self.look()
        return bool(self._fitted)

    def _make_room(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """A hook before a prior is loaded: take over as many cells and rows of the embedding as there are, or none."""
        if f"{prefix}centroids" in state_dict:
            for name in OPTIONAL:
                tensor = state_dict.get(prefix + name)
                setattr(self, name, None if tensor is None else torch.empty_like(tensor, device=self.mean.device))

    def read(self, embeds: Tensor, ids: Tensor) -> Tensor:
        """The embeddings (..., d) of token ids (...) as this prior reads them, from the base model's frozen ones."""
        if self.token_ids is None or self.token_rows is None:
            return embeds
        return replace_rows(embeds, ids, self.token_ids, self.token_rows)

    def look(self, *_: Any) -> None:
        """Read from the centroids whether the prior is fitted; on a GPU this waits for the device."""
        self._fitted = None if self.centroids.is_meta else bool(self.centroids.any())

    @torch.no_grad()
    def set(self, centroids: Tensor, mean: Tensor, mean_scores: Tensor, whitening: Tensor | None = None) -> None:
        """Take over a finished fit, all at once or not at all."""
        with Undone(Snapshot(self, values=copies(self.buffers()))):
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
        """Directions (B, d) or (B, p), float32, that are compared with the centroids, of embeddings (B, d)."""
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

    @property
    def groups(self) -> int:
        """The number of groups that prompts fall into: the cells, or K clusters without any."""
        return len(self.centroids if self.cells is None else self.cells)

    @torch.no_grad()
    def group_of(self, scores: Tensor) -> Tensor:
        """The group in [0, `groups`) that scores (..., K) fall into, and `groups` where all are zero: (...), int64."""
        by_group = scores if self.cells is None else scores @ self.cells.to(scores).T
        return torch.where(scores.any(-1), by_group.argmax(-1), self.groups)

    @torch.no_grad()
    def pulled_back(self) -> Tensor:
        """Vectors (`groups`, d), float32, of which the one with the highest product with `e - mean` tells the group.

        Without cells the products are the scores, up to a factor of the prompt's. The longest vector has length one.
        """
        vectors = self.centroids.float()
        if self.whitening is None and self.cells is None:
            return vectors
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors if self.whitening is None else vectors @ self.whitening.float()
            vectors = vectors if self.cells is None else self.cells.to(vectors) @ vectors
        return vectors / vectors.norm(dim=-1).max().clamp(min=1e-30)
