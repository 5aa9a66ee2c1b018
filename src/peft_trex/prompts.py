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
        self._owner: nn.Module | None = None  # the module whose forward opened the channel
        self._generation: ForwardPrior | None = None
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
            embeds = embedding(ids.to(embedding.weight.device))
        if embeds is None:
            raise ValueError(
                "T-REX computes the prior from the prompt's tokens, but got neither input_ids nor inputs_embeds (only "
                f"{sorted(key for key, value in inputs.items() if value is not None)}). Pass them, or use "
                "prior_encoder='external'."
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
        layer = next((module for module in self.tuner.model.modules() if isinstance(module, TRexLayer)), None)
        if layer is None or layer.disable_adapters or layer.merged:
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
        if self._owner is not None or self.channel.current is not None:
            return args, kwargs  # part of a forward that is running
        adapters = self._adapters()
        if not adapters:
            return args, kwargs
        inputs: dict[str, Any] = kwargs
        if args:
            inputs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        rows, lengths = _batch_shape(inputs)
        prior = self._generation or self._kept(inputs, adapters) or self._score(inputs, embeds, adapters, rows)
        self.channel.current = prior.for_call(rows, lengths)
        self._owner = module
        for checkpointed in self._checkpointed:
            if checkpointed.training and checkpointed.gradient_checkpointing:
                checkpoint = getattr(checkpointed, CHECKPOINT, None)
                if checkpoint is not None and not isinstance(checkpoint, CheckpointWithPrior):
                    setattr(checkpointed, CHECKPOINT, CheckpointWithPrior(checkpoint, self.channel))
        return args, kwargs

    def _close(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._owner is not module:
            return
        prior, self.channel.current, self._owner = self.channel.current, None, None
        encoded = output if hasattr(output, "last_hidden_state") else None
        for kept in (getattr(output, "past_key_values", None), encoded):
            if hasattr(kept, "__dict__"):  # which a tuple has not
                setattr(kept, KEPT_PRIOR, prior)

    def _kept(self, inputs: Mapping[str, Any], adapters: list[str]) -> ForwardPrior | None:
        """The prior of the prompt that a cache, or an encoder's output, among the inputs was computed from."""
        cache = inputs.get("past_key_values")
        if cache is not None and hasattr(cache, "get_seq_length") and cache.get_seq_length() == 0:
            cache = None
        for source in (cache, inputs.get("encoder_outputs")):
            prior = getattr(source, KEPT_PRIOR, None)
            if prior is not None and set(adapters) <= set(prior.scores):
                return prior
        if cache is not None:
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
        if not adapters or self._generation is not None:
            return self._base_generate(*args, **kwargs)
        inputs = {key: kwargs.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask")}
        if inputs["input_ids"] is None:
            inputs["input_ids"] = args[0] if args else kwargs.get("inputs")
        if inputs["attention_mask"] is None and inputs["input_ids"] is not None:
            inputs["attention_mask"] = self._infer_attention_mask(inputs["input_ids"], kwargs)
        if embeds is None and inputs["input_ids"] is None and inputs["inputs_embeds"] is None:
            prior = ForwardPrior(dict.fromkeys(adapters), 1)  # starts from nothing: an empty prompt has no prior
        else:
            prior = self._score(inputs, embeds, adapters, _batch_shape({**inputs, EMBEDS: embeds})[0])
        self._generation = prior
        try:
            return self._base_generate(*args, **kwargs)
        finally:
            self._generation = None

    def _infer_attention_mask(self, prompt: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What transformers takes where none is given: padding equals the pad token, if that is not an end token."""
        config: Any = kwargs.get("generation_config") or self.tuner.model.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        end = kwargs.get("eos_token_id", config.eos_token_id)
        ends = end if isinstance(end, (list, tuple)) else [end]
        return None if pad is None or pad in ends else prompt != pad

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
            f"generate needs it; {wanted}."
        )
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{EMBEDS} is a {type(embeds).__name__}; {wanted}.")
    if tuple(embeds.shape) != (rows, dim):
        raise ValueError(f"{EMBEDS} has shape {tuple(embeds.shape)}; {wanted}.")
    if not torch.isfinite(embeds).all():
        raise ValueError(f"{EMBEDS} holds NaN or infinity; {wanted}, finite.")
    return embeds


def _batch_shape(inputs: Mapping[str, Any]) -> tuple[int, frozenset[int]]:
    """Rows of a forward, and the lengths its sequences have, in tokens."""
    names = ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids", "labels")
    known = [value for name in names if isinstance(value := inputs.get(name), Tensor) and value.dim() > 0]
    if not known:  # a model without tokens: whatever it gets first
        known = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0][:1]
    return (known[0].shape[0] if known else 1), frozenset(value.shape[1] for value in known if value.dim() > 1)
