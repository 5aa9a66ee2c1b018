"""Cells: groups of prompts that are finer than a prior's clusters, so that static weights for each of them miss less.

Without a token router an adapter's weights are static within a prompt, and hang on the prompt's scores alone. So the
prompts are grouped by these: where the scores of a cell's prompts are nearly the same, one static weight serves them.

Axis legend: n prompts, K clusters, m cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data_pass import Data, DataPass
from ..model import find_peft_model, find_tuner
from ..undo import Undone

# So many prompts tell thousands of cells.
MOST = 2**16


def find_cells(model: nn.Module, adapter_name: str, data: Data, number: int) -> Tensor:
    """The centres (m, K), of length one, of so many cells: a k-means of the directions of the prompts' scores.

    The direction of a prompt's scores determines their length, so directions tell all that scores tell.

    Raises:
        ValueError: if the data have fewer distinct prompts than `number`.
    """
    tuner, peft_model = find_tuner(model), find_peft_model(model)
    running, seen = tuner.prompts.channel.running, []

    def note(*_: Any) -> None:
        scores = None if running.state is None else running.state.scores.get(adapter_name)
        if scores is not None:
            # The tokens of a prompt, which stand beside each other, have the same scores.
            rows = scores.flatten(0, -2).float().cpu().unique_consecutive(dim=0)
            seen.append(rows[rows.any(-1)])

    passing = DataPass(tuner, adapter_name, data)
    with Undone(passing), passing as batches:
        # The hook that finds the prior stands before this one.
        handle = tuner.model.register_forward_pre_hook(note)
        try:
            for batch in batches:
                peft_model(**batch)
        finally:
            handle.remove()
    directions = F.normalize(torch.cat(seen), dim=-1) if seen else torch.zeros(0, 1)
    # The same prompt differs in its last bits with the padding of its batch.
    distinct = len((directions * 1e4).round().unique(dim=0))
    if distinct < number:
        raise ValueError(
            f"per_cluster={number} asks for more groups than the {distinct} distinct prompts of the data; give more "
            "data, or a smaller number, or True for one group for each of the prior's clusters. Nothing was stored."
        )
    # scikit-learn takes seconds to import, so it is imported where a fit uses it.
    from sklearn.cluster import KMeans

    sample = directions[:: -(-len(directions) // MOST)]
    centres = KMeans(number, n_init=3, random_state=0).fit(sample.numpy()).cluster_centers_
    return F.normalize(torch.from_numpy(centres), dim=-1)
