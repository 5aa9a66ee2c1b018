"""The frozen token embedding in an adapter's file, where a copy of it is trained beside the adapter.

The prior reads the frozen embedding, and `modules_to_save=["embed_tokens"]` saves the trained one alone. Where tokens
were added to the base model, their frozen rows are random, so they are others whenever the model is made anew. Hence
the file also holds each frozen row that differs from the trained one beside it: those of the tokens that training has
changed, and at most the whole embedding once more (with weight decay, a head that is tied to it, or a state dict of
shards). Training keeps no second copy. A loaded adapter keeps those rows that differ from its base model's, as a rule
those of the added tokens alone; the base model's weights stay as they are.

Axis legend: V tokens of the vocabulary, n tokens with a row of their own, m tokens looked up at once, d width.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .loading import FOREIGN, PREFIX, WrongShape, check_values
from .prior.scorer import PromptScorer
from .prior.token_rows import TOKEN_IDS, TOKEN_ROWS, replace_rows

# So many rows are compared at a time.
CHUNK = 4096

# It gives the rows (m, d) of tokens (m,).
Table = Callable[[Tensor], Tensor]


class SavedRows:
    """What an adapter's file and its prior hold of the frozen embedding.

    Args:
        model: the whole model, as PEFT hands it over.
        scorer: the tuner's.
        adapter_name: the adapter.
    """

    def __init__(self, model: nn.Module, scorer: PromptScorer, adapter_name: str) -> None:
        self.scorer = scorer
        self.adapter_name = adapter_name
        self.embedding = scorer.adapters.embedding()
        self.prior = scorer.adapters.prior_of(adapter_name)
        # Where the prior stands in the model, and where an adapter's trained copy of the embedding does.
        self.place = _name_of(model, lambda module: module is self.prior)
        self.wrapper = _name_of(model, self._trains_embedding)

    def _trains_embedding(self, module: nn.Module) -> bool:
        wraps = isinstance(module, AuxiliaryTrainingWrapper) and module.original_module is self.embedding
        reads = self.scorer.adapters.encoder_of(self.adapter_name) == "input_embeddings"
        return wraps and reads and self.adapter_name in getattr(module, "modules_to_save", ())

    def split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The rows of a file, or of the model's state dict, by their own names, and its other tensors."""
        places = (self.place, str(self.place).rpartition(".")[0])
        keys = {f"{place}.{name}": name for place in places for name in (TOKEN_IDS, TOKEN_ROWS)}
        if self.prior is None:
            return {}, dict(tensors)
        rows = {keys[key]: tensor for key, tensor in tensors.items() if key in keys}
        return rows, {key: tensor for key, tensor in tensors.items() if key not in keys}

    def _by_key(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{self.place}.{name}": tensor for name, tensor in rows.items()}

    def for_file(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows that the file has to hold, by their keys in the model's state dict.

        Of a state dict of shards, all ranks must take part.
        """
        trained = state_dict.get(f"{self.wrapper}.modules_to_save.{self.adapter_name}.weight")
        # Ranks that save nothing have an empty state dict.
        if self.prior is None or self.embedding is None or self.wrapper is None or trained is None:
            return {}
        frozen = state_dict.get(f"{self.wrapper}.original_module.weight")
        weight = self.embedding.weight
        # Of a weight that FSDP2 or ZeRO-3 shards, a rank has only its share.
        if frozen is None and not (hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")):
            frozen = weight
        if frozen is None or frozen.is_meta or frozen.dim() != 2 or frozen.shape != trained.shape:
            self.scorer.warn_once(
                "frozen embedding is not saved",
                "The frozen token embedding, which the prior reads, is not in the state dict that is saved (ZeRO-3 "
                "leaves frozen weights out), so the adapter will read its next base model's. If tokens were added, "
                "save their rows with the base model, and load the adapter onto that.",
            )
            return {}
        prior, embedding = self.prior, self.embedding
        if hasattr(frozen, "full_tensor"):
            # A sharded checkpoint is read into tensors of the same shapes, so the number of rows must not change.
            whole: Tensor = frozen.full_tensor()
            every = torch.arange(len(whole))
            return self._by_key({TOKEN_IDS: every, TOKEN_ROWS: prior.read(_looked_up(embedding, whole, every), every)})
        rows = _differing(
            len(frozen),
            lambda ids: prior.read(_looked_up(embedding, frozen, ids), ids),
            lambda ids: _looked_up(embedding, trained, ids, frozen.dtype),
        )
        return self._by_key(rows)

    def check_embeddings(
        self, model: nn.Module, tensors: Mapping[str, Tensor], in_model: Mapping[str, Tensor]
    ) -> set[str]:
        """The keys of the base model's embeddings in a file, which PEFT's `save_embedding_layers` writes.

        They take the base model's place, for the sake of added tokens, so it warns of the rows that they change. A
        ValueError if these are most of the rows: then the file brings another base model's embedding.
        """
        embeddings = set()
        for side in ("input", "output"):
            # A model of several towers, such as CLIP, has the method and names no embedding.
            with suppress(AttributeError, NotImplementedError):
                embeddings.add(id(getattr(model, f"get_{side}_embeddings")()))
        names = tuple(f"{name}." for name, module in model.named_modules() if id(module) in embeddings)
        keys = {key for key in tensors if key.startswith(names) and key in in_model}
        keys = {key for key in keys if f".{PREFIX}" not in key and ".modules_to_save." not in key}
        for key in keys:
            # A bias has rows of one number.
            new, old = (tensor.reshape(*tensor.shape[:1], -1) for tensor in (tensors[key], in_model[key]))
            if old.is_meta or new.shape[1:] != old.shape[1:]:
                continue
            size = min(len(new), len(old))
            if new.is_floating_point() and old.is_floating_point():
                changed = len(_differing(size, new.__getitem__, old.__getitem__)[TOKEN_IDS])
            else:
                changed = 0 if torch.equal(new, old) else size
            if 2 * changed > size:
                raise ValueError(
                    f"The adapter file holds the base model's own tensor {key}, with {changed} of {size} rows that "
                    f"are others than here. {FOREIGN}. An embedding that is trained belongs into modules_to_save."
                )
            if changed:
                warnings.warn(
                    f"The adapter file holds {key}, saved with save_embedding_layers: {changed} of its rows take the "
                    "base model's place, also where the adapter is disabled or unloaded.",
                    stacklevel=2,
                )
        return keys

    def for_model(self, rows: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those rows of a file that differ from the base model's, by their keys in the model's state dict.

        Args:
            rows: the file's, by their own names.
            tensors: its other tensors, by their keys in the model's state dict.

        Raises:
            ValueError: if the rows fit neither each other nor the trained embedding, or are not finite.
        """
        if not rows:
            return {}
        embedding = self.embedding
        trained = tensors.get(f"{self.wrapper}.modules_to_save.{self.adapter_name}.weight")
        if embedding is None or trained is None:
            raise ValueError(f"The adapter file holds {TOKEN_ROWS}, but no trained token embedding. {FOREIGN}.")
        _check_rows(rows, trained)
        check_values({f"{self.place}.{TOKEN_ROWS}": rows[TOKEN_ROWS]}, {})
        token_ids, token_rows = rows[TOKEN_IDS], rows[TOKEN_ROWS]
        # Where PEFT has saved the frozen embedding, too, it takes the base model's place now.
        frozen = tensors.get(f"{self.wrapper}.original_module.weight")

        def saved(ids: Tensor) -> Tensor:
            if len(token_ids) == len(trained):
                return token_rows[ids.to(token_rows.device)]
            return replace_rows(_looked_up(embedding, trained, ids, token_rows.dtype), ids, token_ids, token_rows)

        def of_base(ids: Tensor) -> Tensor:
            if frozen is not None:
                return _looked_up(embedding, frozen, ids)
            return self.scorer.look_up(embedding, ids[:, None])[:, 0]

        with self.scorer.whole_embedding():
            # PEFT refuses a base model of fewer tokens, unless it is told to leave out what does not fit.
            rows = _differing(min(len(trained), embedding.num_embeddings), saved, of_base)
        if len(rows[TOKEN_IDS]) == 0:
            return {}
        if not embedding.weight.is_meta:
            rows = {name: tensor.to(embedding.weight.device) for name, tensor in rows.items()}
        return self._by_key(rows)


def _name_of(model: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> str | None:
    """The name of a module as it stands in state dicts, which leave out FSDP's own part; None if there is none."""
    names = (name for name, module in model.named_modules() if is_wanted(module))
    name = next(names, None)
    return None if name is None else name.replace("_fsdp_wrapped_module.", "")


def _check_rows(rows: Mapping[str, Tensor], trained: Tensor) -> None:
    """Raise a ValueError if a file's rows are not rows of an embedding (V, d)."""
    token_ids, token_rows = (rows.get(name, torch.empty(0)) for name in (TOKEN_IDS, TOKEN_ROWS))
    rising = token_ids.dtype == torch.long and token_ids.dim() == 1 and bool((token_ids.diff() > 0).all())
    inside = rising and all(0 <= token < len(trained) for token in (*token_ids[:1], *token_ids[-1:]))
    expected = (token_ids.numel(), *trained.shape[1:])
    if not inside or tuple(token_rows.shape) != expected or not token_rows.is_floating_point():
        raise WrongShape(
            f"The T-REX tensors {TOKEN_IDS} {tuple(token_ids.shape)} and {TOKEN_ROWS} {tuple(token_rows.shape)} of "
            f"the file do not fit; expected rising token ids from 0 to {len(trained) - 1}, and for each of them a row "
            f"of width {trained.shape[-1]}. {FOREIGN}."
        )


def _looked_up(embedding: nn.Embedding, weight: Tensor, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What an embedding of such a weight, in a dtype, gives for tokens (m,): some models scale it."""
    rows = weight[ids.to(weight.device)].to(dtype or weight.dtype)
    forward = type(embedding).forward
    if forward is nn.Embedding.forward:
        return rows
    rows = rows if embedding.weight.is_meta else rows.to(embedding.weight.device)
    of_rows = copy.copy(embedding)
    of_rows._parameters = {"weight": nn.Parameter(rows, requires_grad=False)}
    of_rows.padding_idx = None
    return forward(of_rows, torch.arange(len(rows), device=rows.device))


@torch.no_grad()
def _differing(size: int, table: Table, other: Table) -> dict[str, Tensor]:
    """The tokens, out of `size`, whose rows differ in two tables, and the first table's rows of these.

    Rows of two dtypes are compared in the coarser one.
    """
    token_ids, token_rows = [], []
    for ids in torch.arange(size).split(CHUNK):
        rows, others = table(ids), other(ids)
        differs = torch.ones(len(ids), dtype=torch.bool)
        # Nothing is known yet of a base model whose weights will be loaded later.
        if not others.is_meta:
            dtype = max(rows.dtype, others.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            differs = (rows.to(dtype) != others.to(rows.device, dtype)).any(1).cpu()
        token_ids.append(ids[differs])
        token_rows.append(rows[differs.to(rows.device)])
    return {TOKEN_IDS: torch.cat(token_ids), TOKEN_ROWS: torch.cat(token_rows)}
