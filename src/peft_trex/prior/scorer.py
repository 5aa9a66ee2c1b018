"""From the arguments of a call to the scores of its prompts: embed the prompts, and score them for each adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapters
from .inputs import EMBEDS, Inputs
from .prompts import Prompts
from .semantic_prior import SemanticPrior
from .state import ForwardState, Override

UNTOLD = "labels leave no prompt"


class PromptScorer:
    """Scores prompts with the priors of a model's adapters, and warns, once, where a prior is not what it should be.

    Args:
        adapters: the model's.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self._warned: set[str] = set()
        # A sharded embedding may be held in one piece for a while.
        self._whole = False
        # This counts forwards with labels on a device that a look has to wait for.
        self._untold = 0

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> tuple[Tensor, Prompts]:
        """Mean input embedding of each prompt, (P, d) float32, and where the prompts are.

        Raises:
            TypeError, ValueError: for inputs without tokens, or with axes in which no prompt can be found.
        """
        inputs.check_packing()
        embedding, embeds = self.adapters.embedding(), inputs.embeds
        if embeds is None and inputs.ids is not None and embedding is not None:
            embeds = self._look_up(embedding, inputs.ids)
        if embeds is None:
            raise ValueError(
                "T-REX computes the prior from the prompt's tokens, but got neither input_ids nor inputs_embeds (only "
                f"{list(inputs.given)}). Pass them, an encoder's own output object, or use prior_encoder='external'."
            )
        prompts = inputs.prompts(self.adapters.is_causal())
        if prompts.told is not None and self._may_look(prompts.told) and not prompts.told:
            self.warn_once(
                UNTOLD,
                "The labels leave some rows without a prompt (no -100 before the first token that is predicted), so "
                "the whole row counts as its prompt, answer included. Set the prompt's labels to -100 for a prior "
                "that does not see the answer.",
            )
        return prompts.mean(embeds), prompts

    def _look_up(self, embedding: nn.Embedding, ids: Any) -> Tensor:
        if not isinstance(ids, Tensor):
            raise TypeError(f"input_ids is a {type(ids).__name__}; expected a tensor of token ids (B, T).")
        training, embedding.training = embedding.training, False  # NEFTune adds noise to it in training
        # A weight that accelerate keeps elsewhere stands on meta, and its hook knows where the ids have to go.
        ids = ids if embedding.weight.is_meta else ids.to(embedding.weight.device)
        try:
            # FSDP2, ZeRO-3 and accelerate bring the weight when the module is called.
            return embedding.forward(ids) if self._whole else embedding(ids)
        finally:
            embedding.training = training

    @contextmanager
    def whole_embedding(self) -> Iterator[None]:
        """While many batches are embedded outside of a forward: hold a sharded embedding in one piece.

        FSDP2 and ZeRO-3 gather it at each call of the module, in which all ranks must take part; but the ranks' data
        may differ in length. FSDP2 also takes what is called first for the whole model, and refuses that one later.
        All ranks must enter.
        """
        embedding: Any = self.adapters.embedding()
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
        # A look would break a compiled graph; the fit, which sees the same data, warns there.
        if UNTOLD in self._warned or torch.compiler.is_compiling():
            return False
        if told.device.type == "cpu":
            return True
        self._untold += 1
        return self._untold.bit_count() == 1  # the forwards 1, 2, 4, 8, ...

    def score(self, inputs: Inputs, embeds: Any, names: list[str], override: Override | None = None) -> ForwardState:
        """Score the prompts of a forward, or of a generate call, for each of the adapters.

        Where `override` leaves no row to its own prompt there is nothing to score, and the adapter has None.

        Args:
            inputs: the call's.
            embeds: (P, d), embeddings from outside the model for adapters with `prior_encoder="external"`.
            names: the adapters.
            override: what is set instead.
        """
        inputs.check_packing()
        external = [name for name in names if self.adapters.encoder_of(name) == "external"]
        if embeds is not None and not external:
            raise ValueError(
                f"{EMBEDS} was given, but the active adapters {names} compute the prior from the input embeddings; "
                "leave it out, or train with prior_encoder='external'."
            )
        scores: dict[str, Tensor | None] = {}
        embedded: tuple[Tensor, Prompts] | None = None
        for name in names:
            prior = self.adapters.prior_of(name)
            if override is not None and override.covers(name):
                scores[name] = None
            elif prior is None or not prior.fitted:
                self._warn_unfitted(name, prior)
                scores[name] = None
            elif name in external:
                packed = inputs.packed_prompts(inputs.rows if embeds is None else len(embeds))
                count = inputs.rows if packed is None else packed.count
                score = prior.score(_check_embeds(name, embeds, count, prior.dim))
                scores[name] = score if packed is None else packed.spread(score)
            else:
                embedded = embedded or self.embed(inputs)
                means, prompts = embedded
                scores[name] = prompts.spread(prior.score(means) * prompts.known[:, None])
        return ForwardState(scores, inputs.rows)

    def warn_without_labels(self, state: ForwardState) -> None:
        scored = [name for name, scores in state.scores.items() if scores is not None]
        if any(self.adapters.encoder_of(name) == "input_embeddings" for name in scored):
            self.warn_once(
                "no labels",
                "A training forward got no labels, so all its tokens count as the prompt, an answer included. "
                "label_smoothing_factor, compute_loss_func and losses of one's own take the labels away; the forward "
                "takes a completion_mask (B, T), one where tokens are predicted, instead.",
            )

    def _warn_unfitted(self, name: str, prior: SemanticPrior | None) -> None:
        advice = "call initialize_trex_prior before training, or give the Trainer a TRexPriorCallback"
        if prior is None:
            advice = (
                "this model has no token embedding to compute it from. Set use_prior=False, or use "
                "prior_encoder='external'"
            )
        self.warn_once(
            f"unfitted {name}",
            f"The semantic prior of the adapter {name!r} is not fitted and counts as zero: {advice}.",
        )

    def warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)


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
