"""From what a forward gets to the prior of its prompts: embed them, and score them for each adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import TaskType
from torch import Tensor, nn
from transformers import PreTrainedModel

from .prior import ForwardPrior, SemanticPrior
from .spans import Prompts, find_prompts

if TYPE_CHECKING:
    from .model import TRexModel
    from .steering import Steering

EMBEDS = "semantic_embeds"
ANSWERS = ("labels", "completion_mask")  # what may tell a prompt from its answer

BOUNDARIES = ("cu_seq_lens_q", "seq_idx")  # how rows can be packed besides
UNTOLD = "labels leave no prompt"


class PromptScorer:
    """Scores prompts with the priors of a model's adapters, and warns, once, where a prior is not what it should be.

    Args:
        tuner: the model that owns the adapters.
    """

    def __init__(self, tuner: TRexModel) -> None:
        self.tuner = tuner
        self._warned: set[str] = set()
        self._whole = False  # whether a sharded embedding is held in one piece
        self._untold = 0  # forwards with labels, on a device that a look has to wait for

    @torch.no_grad()
    def embed(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Prompts]:
        """Mean input embedding of each prompt, (P, d) float32, and where the prompts are.

        Args:
            inputs: what the model's forward gets: `input_ids` (B, T) or `inputs_embeds` (B, T, d), and optionally
                what [`find_prompts`] reads.
        """
        check_packing(inputs)
        embedding = self.tuner.input_embedding()
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if embeds is None and ids is not None and embedding is not None:
            if not isinstance(ids, Tensor):
                raise TypeError(f"input_ids is a {type(ids).__name__}; expected a tensor of token ids (B, T).")
            training, embedding.training = embedding.training, False  # NEFTune adds noise to it in training
            # a weight that accelerate keeps elsewhere stands on meta, and its hook knows where the ids have to go
            ids = ids if embedding.weight.is_meta else ids.to(embedding.weight.device)
            try:
                # by the module's call, at which FSDP2, ZeRO-3 and accelerate bring the weight
                embeds = embedding.forward(ids) if self._whole else embedding(ids)
            finally:
                embedding.training = training
        if embeds is None:
            raise ValueError(
                "T-REX computes the prior from the prompt's tokens, but got neither input_ids nor inputs_embeds (only "
                f"{sorted(key for key, value in inputs.items() if value is not None)}). Pass them, an encoder's own "
                "output object, or use prior_encoder='external'."
            )
        told_by = ("attention_mask", "position_ids", *(ANSWERS if self.is_causal() else ()))
        prompts = find_prompts(embeds[..., 0], **{name: inputs.get(name) for name in told_by})
        if prompts.told is not None and self._may_look(prompts.told) and not prompts.told:
            self.warn_once(
                UNTOLD,
                "The labels leave some rows without a prompt (no -100 before the first token that is predicted), so "
                "the whole row counts as its prompt, answer included. Set the prompt's labels to -100 for a prior "
                "that does not see the answer.",
            )
        return prompts.mean(embeds), prompts

    @contextmanager
    def whole_embedding(self) -> Iterator[None]:
        """While many batches are embedded outside of a forward: hold a sharded embedding in one piece.

        FSDP2 and ZeRO-3 gather it at each call of the module, in which all ranks must take part; but the ranks' data
        may differ in length. FSDP2 also takes what is called first for the whole model, and refuses that one later.
        All ranks must enter.
        """
        embedding: Any = self.tuner.input_embedding()
        weight: Any = None if embedding is None else embedding.weight
        sharded, zero3 = hasattr(weight, "full_tensor"), hasattr(weight, "ds_id")
        if self._whole or not (sharded or zero3):
            yield
            return
        self._whole = True
        try:
            if zero3:
                import deepspeed  # type: ignore[import-not-found]

                with deepspeed.zero.GatheredParameters([weight]):
                    yield
            else:
                embedding.weight = nn.Parameter(weight.full_tensor(), requires_grad=False)
                try:
                    yield
                finally:
                    embedding.weight = weight
        finally:
            self._whole = False

    def _may_look(self, told: Tensor) -> bool:
        """Whether to look at a value for a warning: not again, and ever more seldom where that waits for a GPU."""
        # it would break a compiled graph; the fit, which sees the same data, warns there
        if UNTOLD in self._warned or torch.compiler.is_compiling():
            return False
        if told.device.type == "cpu":
            return True
        self._untold += 1
        return self._untold.bit_count() == 1  # the forwards 1, 2, 4, 8, ...

    def is_causal(self) -> bool:
        """Whether labels that stand beside the input mark an answer; in an encoder they mark something else."""
        base = self.tuner.model
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            return False
        tasks = {self.tuner.config_of(name).task_type for name in self.tuner.active_adapters} - {None}
        if tasks:
            return TaskType.CAUSAL_LM in tasks
        return isinstance(base, PreTrainedModel) and base.can_generate()

    def score(
        self, inputs: Mapping[str, Any], embeds: Any, adapters: list[str], rows: int, steering: Steering | None = None
    ) -> ForwardPrior:
        """Score the prompts of a forward, or of a generate call, for each of the adapters.

        Where `steering` leaves no row to its own prompt there is nothing to score, and the adapter has None.
        """
        check_packing(inputs)
        external = [name for name in adapters if self.tuner.config_of(name).prior_encoder == "external"]
        if embeds is not None and not external:
            raise ValueError(
                f"{EMBEDS} was given, but the active adapters {adapters} compute the prior from the input embeddings; "
                "leave it out, or train with prior_encoder='external'."
            )
        scores: dict[str, Tensor | None] = {}
        embedded: tuple[Tensor, Prompts] | None = None
        for name in adapters:
            prior = self.tuner.prior_of(name)
            if steering is not None and steering.covers(name):
                scores[name] = None
            elif prior is None or not prior.fitted:
                self._warn_unfitted(name, prior)
                scores[name] = None
            elif name in external:
                prompts = packed_prompts(inputs, rows if embeds is None else len(embeds), rows)
                count = rows if prompts is None else prompts.count
                score = prior.score(_check_embeds(name, embeds, count, prior.dim))
                scores[name] = score if prompts is None else prompts.spread(score)
            else:
                embedded = embedded or self.embed(inputs)
                means, prompts = embedded
                scores[name] = prompts.spread(prior.score(means) * prompts.known[:, None])
        return ForwardPrior(scores, rows)

    def warn_without_labels(self, prior: ForwardPrior) -> None:
        known = [name for name, scores in prior.scores.items() if scores is not None]
        if any(self.tuner.config_of(name).prior_encoder == "input_embeddings" for name in known):
            self.warn_once(
                "no labels",
                "A training forward got no labels, so all its tokens count as the prompt, an answer included. "
                "label_smoothing_factor, compute_loss_func and losses of one's own take the labels away; the forward "
                "takes a completion_mask (B, T), one where tokens are predicted, instead.",
            )

    def _warn_unfitted(self, adapter_name: str, prior: SemanticPrior | None) -> None:
        advice = "call initialize_trex_prior before training, or give the Trainer a TRexPriorCallback"
        if prior is None:
            advice = (
                "this model has no token embedding to compute it from. Set use_prior=False, or use "
                "prior_encoder='external'"
            )
        self.warn_once(
            f"unfitted {adapter_name}",
            f"The semantic prior of the adapter {adapter_name!r} is not fitted and counts as zero: {advice}.",
        )

    def warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)


def check_packing(inputs: Mapping[str, Any]) -> None:
    """Raise a ValueError if rows are packed in a way that does not say where a sequence begins in each row."""
    if inputs.get("position_ids") is None and any(inputs.get(name) is not None for name in BOUNDARIES):
        raise ValueError(
            f"The rows are packed by {' or '.join(BOUNDARIES)} alone; T-REX finds the sequences by position_ids that "
            "start anew. DataCollatorWithFlattening gives them with return_position_ids=True."
        )


def packed_prompts(inputs: Mapping[str, Any], given: int, rows: int) -> Prompts | None:
    """Where the prompts are, for which so many values were given, if rows hold several; None otherwise."""
    tokens, mask, positions = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("position_ids")
    if tokens is None and isinstance(embeds := inputs.get("inputs_embeds"), Tensor):
        tokens = embeds[..., 0]
    if positions is None or tokens is None or (isinstance(mask, Tensor) and mask.dim() != 2):
        return None
    prompts = find_prompts(tokens, mask, None, positions)
    if prompts.index is not None and torch.compiler.is_compiling():  # which cannot count
        return None if given == rows else replace(prompts, count=given)
    return None if prompts.index is None else prompts


def _check_embeds(adapter_name: str, embeds: Any, prompts: int, dim: int) -> Tensor:
    wanted = f"expected a tensor of shape (B, prior_dim) = {(prompts, dim)}, one embedding for each prompt"
    if embeds is None:
        raise ValueError(
            f"{EMBEDS} is missing: the adapter {adapter_name!r} has prior_encoder='external', so each forward and "
            f"generate needs it; {wanted}. In training a SemanticEmbedsCollator adds it to the batches."
        )
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{EMBEDS} is a {type(embeds).__name__}; {wanted}.")
    if tuple(embeds.shape) != (prompts, dim):
        raise ValueError(f"{EMBEDS} has shape {tuple(embeds.shape)}; {wanted}.")
    if not torch.compiler.is_compiling() and not torch.isfinite(embeds).all():  # the look would break the graph
        raise ValueError(f"{EMBEDS} holds NaN or infinity; {wanted}, finite.")
    return embeds
