"""The one place where a prompt's prior is computed and handed down: it sees every forward and generate of a model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import TaskType
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layer import TRexLayer
from .prior import CheckpointWithPrior, ForwardPrior, PriorChannel, SemanticPrior, pool, prompt_mask

if TYPE_CHECKING:
    from .model import TRexModel

EMBEDS = "semantic_embeds"
# A key-value cache, or an encoder's output, carries the prior of the prompt it was computed from under this name.
KEPT_PRIOR = "_trex_prior"
CACHES = ("past_key_values", "cache_params")
CHECKPOINT = "_gradient_checkpointing_func"


class PromptWatch:
    """Computes the prior of each forward from its prompt, and opens the channel to the layers for as long as it runs.

    Its hooks sit on the base model and on every `PreTrainedModel` in it, the outermost of a call counting: some
    callers run the backbone, and `generate` runs an encoder, without the model around it. So they see each call,
    whether or not `PeftModel` passes it through the tuner. `generate` itself is wrapped as well, because it calls the
    model with ever more than the prompt, and refuses arguments that the base model's forward does not name.

    Args:
        tuner: the model that owns the adapters.
        channel: what its layers read.
    """

    def __init__(self, tuner: TRexModel, channel: PriorChannel) -> None:
        self.tuner = tuner
        self.channel = channel
        self._handles: list[Any] = []
        self._checkpointed: list[Any] = []  # modules that transformers may run under gradient checkpointing
        self._base_generate: Any = None
        self._generate_was_own = False
        self._warned: set[str] = set()

    def attach(self) -> None:
        """Start to watch the base model; nothing happens if that is so already."""
        if self._handles:
            return
        base: Any = self.tuner.model
        for hook in list(base._forward_pre_hooks.values()):  # of a tuner that this one replaces
            other = getattr(hook, "__self__", None)
            if isinstance(other, PromptWatch):
                other.detach()
        for module in base.modules():
            if module is base or isinstance(module, PreTrainedModel):
                self._handles += [
                    module.register_forward_pre_hook(self._open, with_kwargs=True),
                    module.register_forward_hook(self._close, always_call=True),
                ]
            if hasattr(module, "gradient_checkpointing"):
                self._checkpointed.append(module)
        if callable(getattr(base, "generate", None)):
            self._base_generate = base.generate
            self._generate_was_own = "generate" in vars(base)
            base.generate = self._generate

    def detach(self) -> None:
        """Leave the base model as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._checkpointed:
            checkpoint = getattr(module, CHECKPOINT, None)
            if isinstance(checkpoint, CheckpointWithPrior):
                setattr(module, CHECKPOINT, checkpoint.checkpoint)
        base: Any = self.tuner.model
        if self._generate_was_own:
            base.generate = self._base_generate
        elif self._base_generate is not None:
            del base.generate
        self._handles, self._checkpointed, self._base_generate = [], [], None

    @torch.no_grad()
    def embed(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean input embedding of each prompt, (B, d) float32, and whether the row has any prompt token, (B,) bool.

        Args:
            inputs: what the model's forward gets: `input_ids` (B, T) or `inputs_embeds` (B, T, d), and optionally
                `attention_mask` (B, T) and, for a causal language model, `labels` (B, T).
        """
        embedding = self.tuner.input_embedding()
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if embeds is None and ids is not None and embedding is not None:
            if not isinstance(ids, Tensor):
                raise TypeError(f"input_ids is a {type(ids).__name__}; expected a tensor of token ids (B, T).")
            training, embedding.training = embedding.training, False  # NEFTune adds noise to it in training
            try:
                embeds = embedding(ids.to(embedding.weight.device))
            finally:
                embedding.training = training
        if embeds is None:
            raise ValueError(
                "T-REX computes the prior from the prompt's tokens, but got neither input_ids nor inputs_embeds (only "
                f"{sorted(key for key, value in inputs.items() if value is not None)}). Pass them, an encoder's own "
                "output object, or use prior_encoder='external'."
            )
        labels = inputs.get("labels") if self._is_causal() else None
        mask, told = prompt_mask(embeds[..., 0], inputs.get("attention_mask"), labels)
        if not told:
            self._warn_once(
                "labels",
                "The labels leave some rows without a prompt (no label is -100), so the whole row counts as its "
                "prompt, answer included. Set the prompt's labels to -100 for a prior that does not see the answer.",
            )
        return pool(embeds, mask), mask.any(-1)

    def _is_causal(self) -> bool:
        """Whether labels that stand beside the input mark an answer; in an encoder they mark something else."""
        base = self.tuner.model
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            return False
        tasks = {self.tuner.config_of(name).task_type for name in self.tuner.active_adapters} - {None}
        if tasks:
            return TaskType.CAUSAL_LM in tasks
        return isinstance(base, PreTrainedModel) and base.can_generate()

    def _adapters(self) -> list[str]:
        """Active adapters that use a prior, while adapters are enabled and not merged."""
        layers = (module for module in self.tuner.model.modules() if isinstance(module, TRexLayer))
        if all(layer.disable_adapters or layer.merged for layer in layers):
            return []
        return [name for name in self.tuner.active_adapters if self.tuner.config_of(name).use_prior]

    def _score(self, inputs: Mapping[str, Any], embeds: Any, adapters: list[str], rows: int) -> ForwardPrior:
        """Score the prompts of a forward, or of a generate call, for each of the adapters."""
        external = [name for name in adapters if self.tuner.config_of(name).prior_encoder == "external"]
        if embeds is not None and not external:
            raise ValueError(
                f"{EMBEDS} was given, but the active adapters {adapters} compute the prior from the input embeddings; "
                "leave it out, or train with prior_encoder='external'."
            )
        scores: dict[str, Tensor | None] = {}
        embedded: tuple[Tensor, Tensor] | None = None
        for name in adapters:
            prior = self.tuner.prior_of(name)
            if prior is None or not prior.fitted:
                self._warn_unfitted(name, prior)
                scores[name] = None
            elif name in external:
                scores[name] = prior.score(_check_embeds(name, embeds, rows, prior.dim))
            else:
                embedded = embedded or self.embed(inputs)
                scores[name] = prior.score(embedded[0]) * embedded[1][:, None]
        return ForwardPrior(scores, rows)

    def _open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a forward: find its prior; `semantic_embeds` is not the base model's and is taken out."""
        embeds = kwargs.pop(EMBEDS, None)
        running = self.channel.running
        if running.owner is module:  # its last forward was interrupted, and never closed
            running.owner = running.prior = None
        if running.prior is not None:
            return args, kwargs  # part of a forward that is running
        adapters = self._adapters()
        if not adapters:
            return args, kwargs
        inputs: dict[str, Any] = kwargs
        if args:
            inputs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        rows, lengths = _batch_shape(inputs)
        prior = running.generation or self._kept(inputs, adapters)
        if prior is None:
            prior = self._score(inputs, embeds, adapters, rows)
            if module.training and inputs.get("labels") is None and self._is_causal():
                self._warn_without_labels(prior)
        running.prior = prior.for_call(rows, lengths)
        running.owner = module
        for checkpointed in self._checkpointed:
            if checkpointed.training and checkpointed.gradient_checkpointing:
                checkpoint = getattr(checkpointed, CHECKPOINT, None)
                if checkpoint is not None and not isinstance(checkpoint, CheckpointWithPrior):
                    setattr(checkpointed, CHECKPOINT, CheckpointWithPrior(checkpoint, self.channel))
        return args, kwargs

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        running = self.channel.running
        if running.owner is not module:
            return
        prior, running.prior, running.owner = running.prior, None, None
        encoded = output if hasattr(output, "last_hidden_state") else None
        for kept in (*(getattr(output, name, None) for name in CACHES), encoded):
            if hasattr(kept, "__dict__"):  # which a tuple has not
                setattr(kept, KEPT_PRIOR, prior)

    def _kept(self, inputs: Mapping[str, Any], adapters: list[str]) -> ForwardPrior | None:
        """The prior of the prompt that a cache, or an encoder's output, among the inputs was computed from."""
        caches = [cache for name in CACHES if (cache := inputs.get(name)) is not None and _cached_tokens(cache) != 0]
        for source in (*caches, inputs.get("encoder_outputs")):
            prior = getattr(source, KEPT_PRIOR, None)
            if prior is not None and set(adapters) <= set(prior.scores):
                return prior
        if caches:
            self._warn_once(
                "cache",
                "A forward goes on from a cache whose prompt T-REX did not see; the prior is computed from the tokens "
                "of this call alone. Use generate, or run the prompt through the same model first.",
            )
        return None

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the prior computed once, from the prompt, for all new tokens."""
        embeds = kwargs.pop(EMBEDS, None)
        adapters = self._adapters()
        running = self.channel.running
        if not adapters or running.generation is not None:
            return self._base_generate(*args, **kwargs)
        running.generation = self._prior_of_prompt(args, kwargs, embeds, adapters)
        try:
            return self._base_generate(*args, **kwargs)
        finally:
            running.generation = running.prior = running.owner = None

    def _prior_of_prompt(
        self, args: tuple, kwargs: Mapping[str, Any], embeds: Any, adapters: list[str]
    ) -> ForwardPrior:
        """The prior for a whole generate call, from its arguments."""
        inputs = {key: kwargs.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask")}
        if inputs["input_ids"] is None:
            inputs["input_ids"] = args[0] if args else kwargs.get("inputs")
        tokens = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        mask, encoded = inputs["attention_mask"], kwargs.get("encoder_outputs")
        cached = _cached_tokens(kwargs.get("past_key_values"))
        # tokens that only go on from a cache: the prompt is what the cache was computed from
        goes_on = False
        if cached and tokens is not None:
            goes_on = tokens.shape[1] <= cached or (mask is not None and mask.shape[1] > tokens.shape[1])
        if embeds is None and (goes_on or (tokens is None and encoded is not None)):
            kept = self._kept(kwargs, adapters)
            if kept is not None:
                return kept
        if embeds is None and tokens is None and encoded is None:
            return ForwardPrior(dict.fromkeys(adapters), 1)  # starts from nothing: an empty prompt has no prior
        if mask is None and inputs["input_ids"] is not None:
            inputs["attention_mask"] = self._infer_attention_mask(inputs["input_ids"], kwargs)
        return self._score({**kwargs, **inputs}, embeds, adapters, _batch_shape({**inputs, EMBEDS: embeds})[0])

    def _infer_attention_mask(self, prompt: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What transformers takes where none is given: padding equals the pad token, if that is not an end token."""
        config: Any = kwargs.get("generation_config") or self.tuner.model.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        end = kwargs.get("eos_token_id", config.eos_token_id)
        ends = end if isinstance(end, (list, tuple)) else [end]
        return None if pad is None or pad in ends else prompt != pad

    def _warn_without_labels(self, prior: ForwardPrior) -> None:
        known = [name for name, scores in prior.scores.items() if scores is not None]
        if any(self.tuner.config_of(name).prior_encoder == "input_embeddings" for name in known):
            self._warn_once(
                "no labels",
                "A training forward got no labels, so all its tokens count as the prompt, an answer included. "
                "label_smoothing_factor, compute_loss_func and losses of one's own take the labels away.",
            )

    def _warn_unfitted(self, adapter_name: str, prior: SemanticPrior | None) -> None:
        advice = "call initialize_trex_prior before training, or give the Trainer a TRexPriorCallback"
        if prior is None:
            advice = (
                "this model has no token embedding to compute it from. Set use_prior=False, or use "
                "prior_encoder='external'"
            )
        self._warn_once(
            f"unfitted {adapter_name}",
            f"The semantic prior of the adapter {adapter_name!r} is not fitted and counts as zero: {advice}.",
        )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)


def _check_embeds(adapter_name: str, embeds: Any, rows: int, dim: int) -> Tensor:
    wanted = f"expected a tensor of shape (B, prior_dim) = {(rows, dim)}, one embedding for each prompt"
    if embeds is None:
        raise ValueError(
            f"{EMBEDS} is missing: the adapter {adapter_name!r} has prior_encoder='external', so each forward and "
            f"generate needs it; {wanted}. A Trainer passes it on with remove_unused_columns=False."
        )
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{EMBEDS} is a {type(embeds).__name__}; {wanted}.")
    if tuple(embeds.shape) != (rows, dim):
        raise ValueError(f"{EMBEDS} has shape {tuple(embeds.shape)}; {wanted}.")
    if not torch.isfinite(embeds).all():
        raise ValueError(f"{EMBEDS} holds NaN or infinity; {wanted}, finite.")
    return embeds


def _cached_tokens(cache: Any) -> int | None:
    """Tokens in a cache; None where there is none, or it does not say."""
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else None


def _batch_shape(inputs: Mapping[str, Any]) -> tuple[int, frozenset[int]]:
    """Rows of a forward, and the lengths its sequences have, in tokens."""
    names = ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids", "labels")
    known = [value for name in names if isinstance(value := inputs.get(name), Tensor) and value.dim() > 0]
    if not known:  # a model without tokens: whatever it gets first
        known = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0][:1]
    return (known[0].shape[0] if known else 1), frozenset(value.shape[1] for value in known if value.dim() > 1)
