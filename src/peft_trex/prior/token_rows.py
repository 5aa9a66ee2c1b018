"""Rows of the frozen token embedding that a prior has of its own, because the base model's are others."""

from __future__ import annotations

import torch
from torch import Tensor

# The names of the two tensors, in a prior and in an adapter's file.
TOKEN_IDS, TOKEN_ROWS = "token_ids", "token_rows"


def replace_rows(embeds: Tensor, ids: Tensor, token_ids: Tensor, token_rows: Tensor) -> Tensor:
    """Embeddings (..., d) of tokens (...), with rows (n, d) instead for some tokens (n,), which rise."""
    if len(token_ids) == 0:
        return embeds
    ids = ids.to(token_ids)
    places = torch.searchsorted(token_ids, ids).clamp(max=len(token_ids) - 1)
    replaced = (token_ids[places] == ids)[..., None].to(embeds.device)
    return torch.where(replaced, token_rows[places].to(embeds), embeds)
