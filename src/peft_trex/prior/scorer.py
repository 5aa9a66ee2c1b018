"""From the arguments of a call to the scores of its prompts: embed the prompts, and score them for each adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapters
from .chat import ChatMarkers
from .history import Content
from .inputs import EMBEDS, Inputs
from .prompts import Prompts, split_turns
from .semantic_prior import SemanticPrior
from .state import Override, Scored

# What is warned of once.
UNTOLD, NO_MESSAGE, SEVERAL = "labels leave no prompt", "no user's message", "several answers without markers"


class PromptScorer:
    """Scores prompts with the priors of a model's adapters, and warns once where a prior is not what it should be."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self._warned: set[str] = set()
        # A sharded embedding may be held in one piece for a while.
        self._whole = False
        # This counts forwards with labels on a device that a look has to wait for.
        self._untold = 0

    @torch.no_grad()
    def embed(
        self,
        inputs: Inputs | Mapping[str, Any],
        adapter_name: str | None = None,
        markers: ChatMarkers | None = None,
    ) -> tuple[Tensor, Prompts]:
        """Mean input embedding of each prompt, (P, d) float32, and where the prompts are.

        Args:
            inputs: a call's or a batch's.
            adapter_name: whose chat markers tell the prompts; None for the first active adapter that has a prior.
            markers: chat markers that the adapter will have; None for those that it has.

        Raises:
            TypeError, ValueError: for inputs without tokens, or with axes in which no prompt can be found.
        """
        inputs = inputs if isinstance(inputs, Inputs) else Inputs.of(inputs)
        inputs.check_packing()
        names = self.adapters.with_prior() if adapter_name is None else [adapter_name]
        if markers is None and names:
            markers = self.adapters.markers_of(names[0])
        inputs = inputs.without_padding(self.adapters.pad_token())
        embeds = self._embeddings(inputs, None, self.adapters.prior_of(names[0]) if names else None)
        prompts = inputs.prompts(self.adapters.is_causal(), markers)
        self._warn_untold(prompts, inputs, markers)
        # Without a word on which answers are predicted, the one to the latest message is.
        prompts = prompts if inputs.told else prompts.of_last_turns()
        return prompts.mean(embeds), prompts

    def _embeddings(self, inputs: Inputs, content: Content | None, prior: SemanticPrior | None) -> Tensor:
        """The embeddings (B, T, d) of a call's tokens, or of these, as a prior reads them."""
        embedding: Any = self.adapters.embedding()
        pieces: tuple[Any, ...] = (inputs.embeds if inputs.embeds is not None else inputs.ids,)
        if content is not None:
            pieces = content.pieces
        looked_up = [
            piece if isinstance(piece, Tensor) and piece.is_floating_point() else self.look_up(embedding, piece, prior)
            for piece in pieces
            if piece is not None and (embedding is not None or inputs.embeds is not None)
        ]
        if not looked_up:
            raise ValueError(
                "T-REX computes the prior from the prompt's tokens, but got neither input_ids nor inputs_embeds (only "
                f"{list(inputs.given)}). Pass them, an encoder's own output object, or use prior_encoder='external'."
            )
        if len(looked_up) == 1:
            return looked_up[0]
        return torch.cat([piece.to(looked_up[0]) for piece in looked_up], 1)

    def look_up(self, embedding: nn.Embedding, ids: Any, prior: SemanticPrior | None = None) -> Tensor:
        """The frozen embeddings (..., d) of token ids, as a prior reads them or as the base model has them."""
        if not isinstance(ids, Tensor):
            raise TypeError(f"input_ids is a {type(ids).__name__}; expected a tensor of token ids (B, T).")
        # A weight that accelerate keeps elsewhere stands on meta, and its hook knows where the ids have to go.
        ids = ids if embedding.weight.is_meta else ids.to(embedding.weight.device)
        training = embedding.training
        # An interrupt may come just before the first of two restorations, so there is a second one.
        try:
            try:
                # NEFTune adds noise to it in training.
                embedding.training = False
                # FSDP2, ZeRO-3 and accelerate bring the weight when the module is called.
                embeds: Tensor = embedding.forward(ids) if self._whole else embedding(ids)
            finally:
                embedding.training = training
        finally:
            embedding.training = training
        return embeds if prior is None else prior.read(embeds, ids)

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
        # Here, too, the second restoration is for an interrupt of the first.
        try:
            try:
                self._whole = True
                if zero3:
                    import deepspeed  # type: ignore[import-not-found]

                    with deepspeed.zero.GatheredParameters([weight]):
                        yield
                else:
                    embedding.weight = nn.Parameter(weight.full_tensor(), requires_grad=False)
                    yield
            finally:
                embedding.weight, self._whole = weight, False
        finally:
            embedding.weight, self._whole = weight, False

    def _may_look(self, key: str, value: Tensor) -> bool:
        """Whether to look at a value for a warning: not again, and ever more seldom where that waits for a GPU."""
        # A look would break a compiled graph; the fit, which sees the same data, warns there.
        if key in self._warned or torch.compiler.is_compiling():
            return False
        if value.device.type == "cpu":
            return True
        self._untold += 1
        return self._untold.bit_count() == 1  # the forwards 1, 2, 4, 8, ...

    @torch.no_grad()
    def score(
        self,
        inputs: Inputs,
        embeds: Any,
        names: list[str],
        override: Override | None = None,
        content: Content | None = None,
        prefix: bool = False,
    ) -> Scored:
        """Score the prompts of a forward, or of a generate call, for each of the adapters.

        Args:
            inputs: the call's.
            embeds: (P, d), embeddings from outside the model for adapters with `prior_encoder="external"`.
            names: the adapters.
            override: what is set instead. Where it leaves no row to its own prompt there is nothing to score.
            content: the tokens to score, where they are not the call's alone: those of a cache, and then the call's.
            prefix: whether the call's tokens may be the beginning of a chat only.
        """
        inputs.check_packing()
        external = [name for name in names if self.adapters.encoder_of(name) == "external"]
        if embeds is not None and not external:
            raise ValueError(
                f"{EMBEDS} was given, but the active adapters {names} compute the prior from the input embeddings; "
                "leave it out, or train with prior_encoder='external'."
            )
        scores: dict[str, Tensor | None] = {}
        split: dict[ChatMarkers | None, Prompts] = {}
        # Adapters whose priors have no rows of their own read the same embeddings, which stand under None.
        embedded: dict[str | None, Tensor] = {}

        def prompts_of(name: str) -> Prompts:
            markers = self.adapters.markers_of(name)
            if markers not in split:
                split[markers] = self._prompts(inputs, content, markers, prefix)
            return split[markers]

        score: Tensor | None
        for name in names:
            prior = self.adapters.prior_of(name)
            if override is not None and override.covers(name):
                scores[name] = None
            elif prior is None or not prior.fitted:
                self._warn_unfitted(name, prior)
                scores[name] = None
            elif name in external:
                packed = inputs.packed_prompts(inputs.rows if embeds is None else len(embeds))
                count = inputs.rows if packed is None else packed.sequences
                score = prior.score(_check_embeds(name, embeds, count, prior.dim))
                scores[name] = score if packed is None else packed.spread_sequences(score)
            else:
                reader = None if prior.token_ids is None else name
                if reader not in embedded:
                    embedded[reader] = self._embeddings(inputs, content, prior)
                prompts = prompts_of(name)
                scores[name] = prompts.spread(prior.score(prompts.mean(embedded[reader])) * prompts.known[:, None])
        if override is not None:
            packed = inputs.packed_prompts(override.rows) if content is None and override.rows > 1 else None
            scores = override.apply(scores, inputs.rows, packed)
        last = {
            name: score[:, -1] if score is not None and score.dim() == 3 else score for name, score in scores.items()
        }
        begun: Tensor | bool = True
        if self.adapters.is_causal():
            for name, running in last.items():
                if running is not None and self.adapters.acts_on_answers(name):
                    score = scores[name]
                    whole = running[:, None] if score is None or score.dim() == 2 else score
                    answers = prompts_of(name).answers
                    if not prefix:
                        # What generate writes behind its prompt is an answer, also without a header before it.
                        answers = torch.cat([answers[:, :-1], torch.ones_like(answers[:, -1:])], 1)
                    scores[name] = whole * answers.to(running.device)[..., None]
            chats = [prompts.begun for prompts in split.values() if prompts.begun is not None]
            if chats:
                begun = torch.stack(chats).all()
        return Scored(scores, last, begun)

    def _prompts(self, inputs: Inputs, content: Content | None, markers: ChatMarkers | None, prefix: bool) -> Prompts:
        """Where the prompts are, with a warning where nobody says it."""
        causal = self.adapters.is_causal()
        if markers is not None and (inputs.ids is None if content is None else content.ids is None):
            self.warn_once(
                "markers without ids",
                "The adapter has chat_markers, which only token ids can show, but a call got inputs_embeds without "
                "input_ids, so all its tokens are pooled. Pass input_ids too, or semantic_prior.",
            )
        if content is None:
            prompts = inputs.prompts(causal, markers, prefix)
        else:
            ids = content.ids if markers else None
            prompts = split_turns(content.attended, content.answered, ids, markers, prefix=prefix and not inputs.told)
        self._warn_untold(prompts, inputs, markers)
        return prompts

    def _warn_untold(self, prompts: Prompts, inputs: Inputs, markers: ChatMarkers | None) -> None:
        if prompts.chat is not None and self._may_look(NO_MESSAGE, prompts.chat) and not prompts.chat:
            self.warn_once(
                NO_MESSAGE,
                "Some rows hold no user's message between the adapter's chat_markers, so all tokens of their prompts "
                "are pooled, and with prior_scope='answer' only labels, a completion_mask and generate tell where "
                "their answers begin. Write prompts by the tokenizer's chat template, as in training.",
            )
        elif prompts.told is not None and inputs.told and self._may_look(UNTOLD, prompts.told) and not prompts.told:
            self.warn_once(
                UNTOLD,
                "The labels leave some rows without a prompt (no -100 before the first token that is predicted, or no "
                "0 in the completion_mask, which counts before labels), so the whole row counts as its prompt, answer "
                "included. Set the prompt's labels to -100, or, to train on the prompt too, pass a completion_mask "
                "(B, T) that is 1 from the answer on.",
            )
        # A batch of several answers is counted where that costs no wait.
        if inputs.told and prompts.earlier is not None and prompts.count < prompts.mask.numel():
            self.warn_once(
                SEVERAL,
                "Some rows hold several answers. Each is trained with the prior of all tokens before it, but "
                "generate, which sees no labels, takes a conversation for one prompt. Set "
                "TRexConfig(chat_markers=peft_trex.chat_markers(tokenizer)) for a prior of each user's message.",
            )

    def warn_untold(self, scored: Scored, training: bool) -> None:
        """Warn that nobody says where a forward's prompts end, where that matters."""
        names = [name for name, score in scored.last.items() if score is not None]
        # A warning would break a compiled graph.
        if not torch.compiler.is_compiling() and any(
            self.adapters.encoder_of(name) == "input_embeddings" for name in names
        ):
            self.warn_once(
                "nobody says",
                f"A {'training ' * training}forward got neither labels nor a completion_mask, so T-REX computes the "
                "prior from all its tokens, an answer included. Pass completion_mask (B, T), one where tokens are "
                "predicted, or use generate, or set the adapter's chat_markers. In a Trainer, label_smoothing_factor, "
                "compute_loss_func and losses of one's own take the labels away; a completion_mask column then needs "
                "remove_unused_columns=False.",
            )

    def _warn_unfitted(self, name: str, prior: SemanticPrior | None) -> None:
        advice = "call initialize_trex_prior before training, or give the Trainer a TRexPriorCallback"
        if prior is None:
            advice = (
                "this model names no token embedding of its prompts to compute it from. Set use_prior=False, or use "
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
            f"generate needs it; {wanted}. In training a SemanticEmbedsCollator adds it to the batches, or a column "
            "of the data with remove_unused_columns=False."
        )
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{EMBEDS} is a {type(embeds).__name__}; {wanted}.")
    if tuple(embeds.shape) != (prompts, dim):
        raise ValueError(f"{EMBEDS} has shape {tuple(embeds.shape)}; {wanted}.")
    if not torch.compiler.is_compiling() and not torch.isfinite(embeds).all():  # the look would break the graph
        raise ValueError(f"{EMBEDS} holds NaN or infinity; {wanted}, finite.")
    return embeds
