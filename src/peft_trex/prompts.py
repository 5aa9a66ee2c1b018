"""The one place where a prompt's prior is computed and handed down: it sees every forward and generate of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .balance import LOSS, RouterLosses, share_of
from .layer import TRexLayer
from .prior import CheckpointWithPrior, ForwardPrior, PriorChannel
from .scoring import ANSWERS, EMBEDS, PromptScorer, packed_prompts
from .steering import SEMANTIC_PRIOR, Steering, find_steerable, resolve

if TYPE_CHECKING:
    from .model import TRexModel

# A key-value cache, or an encoder's output, carries the prior of the prompt it was computed from under this name.
KEPT_PRIOR = "_trex_prior"
# What transformers calls the cache, in a forward's arguments and in its output: the first from 5.24 on, where the
# others are deprecated.
CACHES = ("cache", "past_key_values", "cache_params")
COMPLETION = "completion_mask"
# transformers 5.24 renamed the methods to `activation_checkpointing_enable` and so on, and kept this attribute
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
        self.scorer = PromptScorer(tuner)
        self._handles: list[Any] = []
        self._checkpointed: list[Any] = []  # modules that transformers may run under gradient checkpointing
        self._wrapped: dict[str, tuple[Any, bool]] = {}  # methods of the base model, and whether they were its own

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
        for name, watched in (("generate", self._generate), ("generate_batch", self._generate_batch)):
            method = getattr(base, name, None)
            if callable(method):
                self._wrapped[name] = (method, name in vars(base))
                setattr(base, name, watched)

    def detach(self) -> None:
        """Leave the base model as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._checkpointed:
            checkpoint = getattr(module, CHECKPOINT, None)
            if isinstance(checkpoint, CheckpointWithPrior):
                setattr(module, CHECKPOINT, checkpoint.checkpoint)
        base: Any = self.tuner.model
        for name, (method, own) in self._wrapped.items():
            if own:
                setattr(base, name, method)
            else:
                delattr(base, name)
        self._handles, self._checkpointed, self._wrapped = [], [], {}

    def _adapters(self) -> list[str]:
        """Active adapters that use a prior, while adapters are enabled and not merged."""
        layers = (module for module in self.tuner.model.modules() if isinstance(module, TRexLayer))
        if all(layer.disable_adapters or layer.merged for layer in layers):
            return []
        return [name for name in self.tuner.active_adapters if self.tuner.config_of(name).use_prior]

    def _open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a forward: find its prior; the arguments that are ours are taken out.

        These are `semantic_embeds`, `semantic_prior` and, unless the module names it as its own, `completion_mask`.
        """
        embeds, chosen, completion_mask = kwargs.pop(EMBEDS, None), kwargs.pop(SEMANTIC_PRIOR, None), None
        if COMPLETION in kwargs and COMPLETION not in inspect.signature(module.forward).parameters:
            completion_mask = kwargs.pop(COMPLETION)
        running = self.channel.running
        if running.owner is module:  # its last forward was interrupted, and never closed
            running.owner = running.prior = None
        if running.prior is not None:
            return args, kwargs  # part of a forward that is running
        if self.channel.calibrated and module.training and torch.is_grad_enabled():
            self.tuner.forget_trained()
        adapters = self._adapters()
        steering, coefficients = self._steering(chosen, adapters), self._coefficients(module)
        if not (adapters or coefficients):
            return args, kwargs
        named = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) if args else {}
        inputs: dict[str, Any] = {**named, **kwargs, COMPLETION: completion_mask}
        rows, lengths = batch_shape(inputs)
        prior = ForwardPrior({}, rows, lengths)
        if adapters:
            prior = self._prior_of_forward(module, inputs, embeds, adapters, steering)
        if coefficients:
            share = share_of(inputs, shifted=self.scorer.is_causal())
            prior = replace(prior, losses=RouterLosses(coefficients, self._attended(inputs), share))
        running.prior = prior
        running.owner = module
        for checkpointed in self._checkpointed:
            if checkpointed.training and checkpointed.gradient_checkpointing:
                checkpoint = getattr(checkpointed, CHECKPOINT, None)
                if checkpoint is not None and not isinstance(checkpoint, CheckpointWithPrior):
                    setattr(checkpointed, CHECKPOINT, CheckpointWithPrior(checkpoint, self.channel))
        return args, kwargs

    def _prior_of_forward(
        self,
        module: nn.Module,
        inputs: Mapping[str, Any],
        embeds: Any,
        adapters: list[str],
        steering: Steering | None,
    ) -> ForwardPrior:
        running, (rows, lengths) = self.channel.running, batch_shape(inputs)
        prior = running.generation or self._kept(inputs, adapters, steering)
        own = prior is None
        if prior is None:
            prior = self.scorer.score(inputs, embeds, adapters, rows, steering)
            if module.training and self.scorer.is_causal() and all(inputs.get(name) is None for name in ANSWERS):
                self.scorer.warn_without_labels(prior)
        self._check_images(inputs, rows)
        prior = prior.for_call(rows, lengths)
        if steering is not None and running.generation is None:  # which is steered already
            packed = own and steering.rows > 1
            prior = steering.apply(prior, packed_prompts(inputs, steering.rows, rows) if packed else None)
        return prior

    def _coefficients(self, module: nn.Module) -> dict[str, tuple[float, float]]:
        """Of the router losses of each active adapter that has some, in training."""
        if not (module.training and torch.is_grad_enabled()):
            return {}
        configs = {name: self.tuner.config_of(name) for name in self.tuner.active_adapters}
        found = {name: (one.balance_loss_coef, one.router_z_loss_coef) for name, one in configs.items()}
        return {name: coefficients for name, coefficients in found.items() if any(coefficients)}

    def _attended(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """(B, T), where layers see tokens that count; None where that is not known of all of them."""
        mask = inputs.get("attention_mask")
        two_sided = getattr(getattr(self.tuner.model, "config", None), "is_encoder_decoder", False)
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 and not two_sided else None

    def _steering(self, chosen: Any, adapters: list[str]) -> Steering | None:
        """What takes the place of the prior of these adapters: the argument of a call, or the block around it."""
        around = self.channel.running.steering
        if chosen is None and around is None:
            return None
        if not adapters:  # what asks for the base model gets it
            layers = [module for module in self.tuner.model.modules() if isinstance(module, TRexLayer)]
            if not all(layer.disable_adapters for layer in layers):
                find_steerable(self.tuner)
            return None
        return around if chosen is None else resolve(self.tuner, chosen, adapters)

    def _check_images(self, inputs: Mapping[str, Any], rows: int) -> None:
        """Refuse images that are no row's own: a layer that sees them one below the other would take them for rows."""
        ids, base = inputs.get("input_ids"), self.tuner.model
        token = getattr(getattr(base, "config", None), "image_token_id", None)
        if token is None or rows == 1 or not isinstance(ids, Tensor) or inputs.get("pixel_values") is None:
            return
        counts = (ids == token).sum(-1)
        if (counts == counts[0]).all():
            return
        embedding = self.tuner.input_embedding()
        head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
        parts = [part for part in base.modules() if isinstance(part, PreTrainedModel)]
        text = [set(part.modules()) for part in parts if any(module is embedding for module in part.modules())]
        inside = {head, *min(text, key=len)} if text else set()
        layers = (name for name, layer in base.named_modules() if isinstance(layer, TRexLayer) and layer not in inside)
        outside = next(layers, None)
        if outside is not None:
            raise ValueError(
                f"The prompts hold different numbers of image tokens, {counts.tolist()}, so the layer {outside} "
                "cannot tell which prompt an image belongs to. Leave the layers that see images out with "
                "exclude_modules, call the model with one prompt at a time, or set use_prior=False."
            )

    def _close(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After a forward, which may have failed: keep its prior with its cache, and add the router losses."""
        running = self.channel.running
        if running.owner is not module:
            return None
        prior, running.prior, running.owner = running.prior, None, None
        encoded = output if hasattr(output, "last_hidden_state") else None
        for carrier in (*caches_in(output), encoded):
            if prior is not None and hasattr(carrier, "__dict__"):  # which a tuple has not
                setattr(carrier, KEPT_PRIOR, prior.kept())
        if prior is None or prior.losses is None or output is None:
            return None
        return self._add_losses(prior.losses, output)

    def _add_losses(self, losses: RouterLosses, output: Any) -> Any:
        """The output with the router losses in its loss; None if they cannot be put there."""
        loss = getattr(output, "loss", None)
        total = losses.total(None if loss is None else loss.device)
        if total is None:
            return None
        if isinstance(output, ModelOutput):
            setattr(output, LOSS, total)
        if loss is not None:
            output.loss = loss + total.to(loss.dtype)
            return output
        self.scorer.warn_once(
            "losses",
            "balance_loss_coef and router_z_loss_coef have no effect on a loss that is not computed by the model's "
            f"forward: it needs labels and return_dict=True. Add the output's `{LOSS}` to your own loss.",
        )
        return None

    def _kept(self, inputs: Mapping[str, Any], adapters: list[str], steering: Steering | None) -> ForwardPrior | None:
        """The prior of the prompt that a cache, or an encoder's output, among the inputs was computed from."""
        caches = [cache for cache in caches_in(inputs) if _cached_tokens(cache) != 0]
        for source in (*caches, inputs.get("encoder_outputs")):
            prior = getattr(source, KEPT_PRIOR, None)
            if prior is not None and set(adapters) <= set(prior.scores):
                return prior
        if caches and (steering is None or not all(steering.covers(name) for name in adapters)):
            self.scorer.warn_once(
                "cache",
                "A forward goes on from a cache whose prompt T-REX did not see; the prior is computed from the tokens "
                "of this call alone. Use generate, or run the prompt through the same model first.",
            )
        return None

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the prior computed once, from the prompt, for all new tokens."""
        embeds, chosen = kwargs.pop(EMBEDS, None), kwargs.pop(SEMANTIC_PRIOR, None)
        adapters = self._adapters()
        steering = self._steering(chosen, adapters)
        running = self.channel.running
        if not adapters or running.generation is not None:
            return self._wrapped["generate"][0](*args, **kwargs)
        prior = self._prior_of_prompt(args, kwargs, embeds, adapters, steering)
        running.generation = prior if steering is None else steering.apply(prior, None)
        try:
            return self._wrapped["generate"][0](*args, **kwargs)
        finally:
            running.generation = running.prior = running.owner = None

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's continuous batching, which writes requests one after the other without saying where."""
        if self._adapters():
            raise NotImplementedError(
                "T-REX does not support generate_batch: it does not tell which prompt a token belongs to. Use "
                "generate with a padded batch, or train with use_prior=False."
            )
        return self._wrapped["generate_batch"][0](*args, **kwargs)

    def _prior_of_prompt(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        embeds: Any,
        adapters: list[str],
        steering: Steering | None,
    ) -> ForwardPrior:
        """The prior for a whole generate call, from its arguments."""
        inputs = {key: kwargs.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask")}
        whole = dict.fromkeys((*ANSWERS, "position_ids"))  # all that generate gets is prompt
        if inputs["input_ids"] is None:
            inputs["input_ids"] = args[0] if args else kwargs.get("inputs")
        tokens = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        mask, encoded = inputs["attention_mask"], kwargs.get("encoder_outputs")
        cached = next((_cached_tokens(cache) for cache in caches_in(kwargs)), None)
        # tokens that only go on from a cache: the prompt is what the cache was computed from
        goes_on = False
        if cached and tokens is not None:
            goes_on = tokens.shape[1] <= cached or (mask is not None and mask.shape[1] > tokens.shape[1])
        if embeds is None and (goes_on or (tokens is None and encoded is not None)):
            kept = self._kept(kwargs, adapters, steering)
            if kept is not None:
                return kept
        if embeds is None and tokens is None and encoded is None:
            return ForwardPrior(dict.fromkeys(adapters), 1)  # starts from nothing: an empty prompt has no prior
        if mask is None and inputs["input_ids"] is not None:
            inputs["attention_mask"] = self._infer_attention_mask(inputs["input_ids"], kwargs)
        rows, _ = batch_shape({**inputs, EMBEDS: embeds})
        self._check_images({**kwargs, **inputs}, rows)
        return self.scorer.score({**kwargs, **inputs, **whole}, embeds, adapters, rows, steering)

    def _infer_attention_mask(self, prompt: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What transformers takes where none is given: padding equals the pad token, if that is not an end token."""
        config: Any = kwargs.get("generation_config") or self.tuner.model.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        end = kwargs.get("eos_token_id", config.eos_token_id)
        ends = end if isinstance(end, (list, tuple)) else [end]
        return None if pad is None or pad in ends else prompt != pad


def caches_in(values: Any) -> list[Any]:
    """The caches among a forward's arguments or in its output; a tuple does not say where they are."""
    # an output's attributes of the old names would warn, and its own names have only those that are there
    named = values if isinstance(values, Mapping) else getattr(values, "__dict__", {})
    return [value for name, value in named.items() if name in CACHES and value is not None]


def _cached_tokens(cache: Any) -> int | None:
    """Tokens in a cache; None where there is none, or it does not say."""
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else None


def batch_shape(inputs: Mapping[str, Any]) -> tuple[int, frozenset[int]]:
    """Rows of a forward, and the lengths its sequences have, in tokens."""
    names = ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids", "labels")
    known = [value for name in names if isinstance(value := inputs.get(name), Tensor) and value.dim() > 0]
    if not known:  # a model without tokens: whatever it gets first
        known = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0][:1]
    return (known[0].shape[0] if known else 1), frozenset(value.shape[1] for value in known if value.dim() > 1)
