"""Embeddings of one's own (`prior_encoder="external"`) on their way from a data set to the forward.

Axis legend: B rows of a batch, T tokens, P prompts (one a row, or several in a row that packs them), d width of the
embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..prior.inputs import EMBEDS, Inputs

if TYPE_CHECKING:
    from datasets import Dataset

Encode = Callable[[list[str]], Any]
# TRL's preference trainers keep the prompt's tokens in a column of their own.
PROMPT_IDS = "prompt_ids"
# Elsewhere these columns tell a row's prompt. They are padded by these values.
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100, "completion_mask": 0}


def embed_prompts(
    batch: Mapping[str, Sequence[Any]], encode: Encode, tokenizer: Any, task_type: str = "CAUSAL_LM"
) -> dict[str, np.ndarray]:
    """The column `semantic_embeds`, (N, d) float32, for a tokenised data set, to be given to `Dataset.map`:

        dataset = dataset.map(embed_prompts, batched=True, fn_kwargs={"encode": encode, "tokenizer": tokenizer})

    A row's prompt is found as the model finds it: the tokens that are attended to and, for "CAUSAL_LM", come before
    the first that is predicted (label not -100, or `completion_mask` not zero where there are no labels). Rows with
    `prompt_ids`, as TRL's preference trainers make them, name it themselves. It is decoded without special tokens.
    A row without a prompt gets zeros.

    Args:
        batch: columns of the data set.
        encode: takes N texts, returns embeddings (N, d): `SentenceTransformer.encode`, for instance.
        tokenizer: the one that made the tokens.
        task_type: that of the TRexConfig; labels mark an answer within the input for "CAUSAL_LM" only.

    Raises:
        ValueError: if the batch has no tokens, or `encode` returns another shape or a value that is not finite.
    """
    return {EMBEDS: _encode(_row_prompts(batch, task_type), encode, tokenizer)}


class SemanticEmbedsCollator:
    """Wraps a data collator, and adds `semantic_embeds` (P, d) to the batches it makes.

    It looks the embeddings up by the tokens of the prompts in the finished batch, so that no column has to come
    through: it works with a Trainer's `remove_unused_columns`, TRL's choice of columns, packing and padding-free rows
    (one embedding for each sequence, in their order).

    Args:
        collator: any collator that returns `input_ids`. With TRL set `trainer.data_collator = SemanticEmbedsCollator(
            trainer.data_collator, ...)`, since some of its modes take no other when the trainer is built.
        source: a `datasets.Dataset` with the tokenised rows and their `semantic_embeds`, as [`embed_prompts`] makes
            it, with the evaluation rows if there are any (`concatenate_datasets`). It stays where it is; only a digest
            of each prompt is kept. Or `encode`, as [`embed_prompts`] takes it: each prompt is then encoded when it
            comes for the first time, and its embedding kept in memory (in each worker of a DataLoader by itself).
        tokenizer, task_type: as in [`embed_prompts`]; the tokenizer only with `encode`.

    Raises:
        TypeError, ValueError: if the source is neither, lacks a column, or has no tokenizer with it; in a call, if a
            prompt is not in the data set.
    """

    def __init__(
        self, collator: Callable, source: Dataset | Encode, tokenizer: Any = None, task_type: str = "CAUSAL_LM"
    ) -> None:
        self.collator = collator
        self.task_type = task_type
        self._embeds_of: _Table | _Encoder
        if isinstance(getattr(source, "column_names", None), list) and hasattr(source, "__len__"):
            self._embeds_of = _Table(source, task_type)
        elif not callable(source):
            raise TypeError(
                f"source is a {type(source).__name__}; expected a datasets.Dataset, which finds rows by their number, "
                "or a function from texts to embeddings (N, d). Take one split of a DatasetDict; for a stream, give "
                "the encoder as source."
            )
        elif tokenizer is None:
            raise ValueError("A function as source gets texts; give the tokenizer too, which made the tokens.")
        else:
            self._embeds_of = _Encoder(source, tokenizer)

    def __call__(self, features: Any) -> Any:
        batch: MutableMapping[str, Any] = self.collator(features)
        if "input_ids" not in batch:
            raise ValueError(
                f"The collator, a {type(self.collator).__name__}, returned {sorted(batch)}; to find the prompts, "
                f"input_ids is needed. For images or sound without text keep {EMBEDS} as a column of the data, with "
                "remove_unused_columns=False in a Trainer's arguments, and leave this collator out."
            )
        batch[EMBEDS] = self._embeds_of(_batch_prompts(batch, self.task_type))
        return batch


class _Table:
    """Embeddings in a data set, which are found by the digest of their prompt's tokens."""

    def __init__(self, dataset: Dataset, task_type: str) -> None:
        columns = dataset.column_names
        if EMBEDS not in columns or not {"input_ids", PROMPT_IDS} & set(columns):
            raise ValueError(
                f"The data set has the columns {columns}; expected {EMBEDS} and the tokens (input_ids). Add the "
                "embeddings with dataset.map(embed_prompts, batched=True, ...)."
            )
        tokens = dataset.select_columns([name for name in (*PADDING, PROMPT_IDS) if name in columns])
        batches = tokens.with_format("numpy").iter(batch_size=1000)
        prompts = chain.from_iterable(_row_prompts(batch, task_type) for batch in batches)
        self.row_of: dict[bytes, int] = {}
        for row, prompt in enumerate(prompts):
            self.row_of.setdefault(_digest(prompt), row)
        self.embeds = dataset.with_format("numpy", columns=[EMBEDS])

    def __call__(self, prompts: list[Tensor]) -> Tensor:
        rows = [self.row_of.get(_digest(prompt)) for prompt in prompts]
        unknown = [prompt for prompt, row in zip(prompts, rows, strict=True) if row is None and len(prompt)]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of the {len(prompts)} prompts of a batch are not in the data set of embeddings; the "
                f"first has the tokens {unknown[0].tolist()}. The collator needs the rows that are trained and "
                "evaluated on, tokenised, truncated and labelled as in the batch; or give it the encoder as source."
            )
        # Where there is no prompt any row will do, because it becomes zero.
        embeds = as_array(np.stack(self.embeds[[row or 0 for row in rows]][EMBEDS]))
        embeds[[row is None for row in rows]] = 0
        return torch.from_numpy(embeds)


@dataclass
class _Encoder:
    """Embeddings that are made when a prompt comes for the first time, and kept."""

    encode: Encode
    tokenizer: Any
    embeds: dict[bytes, np.ndarray] = field(default_factory=dict)

    def __call__(self, prompts: list[Tensor]) -> Tensor:
        digests = [_digest(prompt) for prompt in prompts]
        new = {digest: prompt for digest, prompt in zip(digests, prompts, strict=True) if digest not in self.embeds}
        if new:
            self.embeds.update(zip(new, _encode(list(new.values()), self.encode, self.tokenizer), strict=True))
        return torch.from_numpy(np.stack([self.embeds[digest] for digest in digests]))


def _digest(prompt: Tensor) -> bytes:
    return hashlib.blake2b(prompt.to("cpu", torch.int64).numpy().tobytes(), digest_size=16).digest()


def _encode(prompts: Sequence[Tensor], encode: Encode, tokenizer: Any) -> np.ndarray:
    """Embeddings (P, d), float32, of prompts given as tokens; zero for one without any."""
    texts = [tokenizer.decode(prompt.tolist(), skip_special_tokens=True) for prompt in prompts if len(prompt)]
    # Without any text an empty one is encoded, which tells d.
    encoded, count = as_array(encode(texts or [""])), max(len(texts), 1)
    if encoded.ndim != 2 or len(encoded) != count:
        raise ValueError(
            f"encode returned an array of shape {encoded.shape} for {count} texts; expected (N, d), one embedding for "
            "each."
        )
    if not np.isfinite(encoded).all():
        raise ValueError("encode returned NaN or infinity; the embeddings must be finite.")
    embeds = np.zeros((len(prompts), encoded.shape[1]), dtype=np.float32)
    embeds[[len(prompt) > 0 for prompt in prompts]] = encoded[: len(texts)]
    return embeds


def as_array(values: Any) -> np.ndarray:
    """Numbers as float32."""
    if isinstance(values, Tensor):
        values = values.detach().float().cpu()
    # A number too large for float32 becomes infinity, which is refused later, by name.
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32)


def as_mapping(batch: Any, tokenizer: Any) -> Mapping[str, Any]:
    """A batch of data as a mapping; rows with a `prompt` are tokenised.

    Raises:
        TypeError: for anything else, or such rows without a tokenizer.
    """
    if isinstance(batch, list) and tokenizer is not None and batch and "prompt" in batch[0]:
        return tokenize_prompts(batch, tokenizer)
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"The dataloader gave a {type(batch).__name__}; expected a mapping such as {{'input_ids': ...}}, "
            "or a list of rows with a 'prompt', and a tokenizer."
        )
    return batch


def tokenize_prompts(rows: Sequence[Any], tokenizer: Any) -> dict[str, Tensor]:
    """Rows with a `prompt`, a text or messages, as a batch: what TRL's online trainers make of the rows they get."""
    prompts = [row["prompt"] for row in rows]
    if isinstance(prompts[0], str):
        return _pad(tokenizer(text=prompts))
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return _pad(tokenizer.apply_chat_template(conversation=prompts, **options))


def _pad(rows: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """Columns of rows of unlike lengths as tensors (B, T), with an attention mask."""
    columns = {name: rows[name] for name in PADDING if name in rows}
    columns.setdefault("attention_mask", [[1] * len(row) for row in rows["input_ids"]])
    return {name: pad_sequence(_tensors(column), True, PADDING[name]) for name, column in columns.items()}


def _tensors(rows: Sequence[Any]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


def _row_prompts(batch: Mapping[str, Sequence[Any]], task_type: str) -> list[Tensor]:
    """The prompts' tokens of rows of a data set, which are not padded."""
    if PROMPT_IDS in batch:
        return _tensors(batch[PROMPT_IDS])
    if "input_ids" not in batch:
        raise ValueError(f"The rows have the columns {sorted(batch)}; expected input_ids: tokenise them first.")
    if len(batch["input_ids"]) and np.ndim(batch["input_ids"][0]) == 0:
        raise ValueError("input_ids holds numbers and not rows of them; map with batched=True.")
    # Labels of another task may be anything, and tell nothing of the prompt.
    columns = PADDING if task_type == "CAUSAL_LM" else ("input_ids", "attention_mask")
    return _batch_prompts(_pad({name: batch[name] for name in columns if name in batch}), task_type)


def _batch_prompts(batch: Mapping[str, Any], task_type: str) -> list[Tensor]:
    """The prompts' tokens of a finished batch, found by the rule that the model goes by."""
    inputs = Inputs.of(batch)
    inputs.check_packing()
    prompts = inputs.prompts(causal=task_type == "CAUSAL_LM")
    ids = batch["input_ids"]
    mask, rows = prompts.mask, torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
    # A sequence has one embedding, that of its first prompt.
    if prompts.earlier is not None and prompts.first is not None and prompts.index is not None:
        mask = mask & (prompts.index == prompts.first[prompts.index])
    sequences = rows if prompts.sequence is None else prompts.sequence
    return list(ids[mask].split(torch.bincount(sequences[mask], minlength=prompts.sequences).tolist()))
