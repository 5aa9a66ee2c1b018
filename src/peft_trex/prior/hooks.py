"""The one place where a prompt's prior is computed and handed down: it sees every forward and generate of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..router_losses import LOSS, RouterLosses
from .adapters import Adapters
from .channel import CheckpointWithPrior, PriorChannel
from .inputs import COMPLETION, EMBEDS, SEMANTIC_PRIOR, Inputs, cached_tokens, caches_in
from .override import find_steerable, resolve
from .scorer import PromptScorer
from .state import ForwardState, Override

# A key-value cache, or an encoder's output, carries the state of the prompt it was computed from under this name.
KEPT_PRIOR = "_trex_prior"
# transformers 5.24 renamed the methods to `activation_checkpointing_enable` and so on, and kept this attribute.
CHECKPOINT = "_gradient_checkpointing_func"


class PromptWatch:
    """Computes the prior of each forward from its prompt, and opens the channel to the layers for as long as it runs.

    Its hooks sit on the base model and on every `PreTrainedModel` in it, and the outermost of a call counts: some
    callers run the backbone, and `generate` runs an encoder, without the model around it. So they see each call,
    whether or not `PeftModel` passes it through the tuner. `generate` itself is wrapped as well, because it calls the
    model with ever more than the prompt, and refuses arguments that the base model's forward does not name.

    Args:
        adapters: the model's.
        channel: what the layers read.
    """

    def __init__(self, adapters: Adapters, channel: PriorChannel) -> None:
        self.adapters = adapters
        self.channel = channel
        self.scorer = PromptScorer(adapters)
        self._handles: list[Any] = []
        # Transformers may run these modules under gradient checkpointing.
        self._checkpointed: list[Any] = []
        # Methods of the base model that are wrapped, and whether they stood in the object itself, not in its class.
        self._wrapped: dict[str, tuple[Any, bool]] = {}

    def attach(self) -> None:
        """Start to watch the base model; nothing happens if that is so already."""
        if self._handles:
            return
        base: Any = self.adapters.base
        # A tuner that this one replaces may have left its hooks.
        for watch in [getattr(hook, "__self__", None) for hook in base._forward_pre_hooks.values()]:
            if isinstance(watch, PromptWatch):
                watch.detach()
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
        base: Any = self.adapters.base
        for name, (method, in_object) in self._wrapped.items():
            if in_object:
                setattr(base, name, method)
            else:
                delattr(base, name)
        self._handles, self._checkpointed, self._wrapped = [], [], {}

    def _open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a forward: compute its state, unless it is part of a forward that runs; take out our arguments.

        These are `semantic_embeds`, `semantic_prior` and, unless the module names it as its own, `completion_mask`.
        """
        embeds, chosen, completion_mask = kwargs.pop(EMBEDS, None), kwargs.pop(SEMANTIC_PRIOR, None), None
        if COMPLETION in kwargs and COMPLETION not in inspect.signature(module.forward).parameters:
            completion_mask = kwargs.pop(COMPLETION)
        running = self.channel.running
        # A module that owns the running forward and is called again was interrupted, and its forward never closed.
        if running.owner is module:
            running.owner = running.state = None
        if running.state is not None:
            return args, kwargs
        if self.channel.calibrated and module.training and torch.is_grad_enabled():
            self.adapters.before_training()
        names = self.adapters.running()
        override, coefficients = self._override(chosen, names), self._coefficients(module)
        if not (names or coefficients):
            return args, kwargs
        named = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) if args else {}
        inputs = Inputs.of({**named, **kwargs, COMPLETION: completion_mask})
        state = ForwardState({}, inputs.rows, inputs.lengths)
        if names:
            state = self._state_of_forward(module, inputs, embeds, names, override)
        if coefficients:
            share = inputs.share_of_loss(shifted=self.adapters.is_causal())
            state = replace(state, losses=RouterLosses(coefficients, self._attended(inputs), share))
        running.state = state
        running.owner = module
        self._wrap_checkpoints()
        return args, kwargs

    def _wrap_checkpoints(self) -> None:
        """Have layers that run under gradient checkpointing see this forward's state when they run again."""
        for module in self._checkpointed:
            if module.training and module.gradient_checkpointing:
                checkpoint = getattr(module, CHECKPOINT, None)
                if checkpoint is not None and not isinstance(checkpoint, CheckpointWithPrior):
                    setattr(module, CHECKPOINT, CheckpointWithPrior(checkpoint, self.channel))

    def _state_of_forward(
        self, module: nn.Module, inputs: Inputs, embeds: Any, names: list[str], override: Override | None
    ) -> ForwardState:
        generation = self.channel.running.generation
        state = generation or self._kept(inputs, names, override)
        scored = state is None
        if state is None:
            state = self.scorer.score(inputs, embeds, names, override)
            untold = inputs.labels is None and inputs.completion_mask is None
            if module.training and untold and self.adapters.is_causal():
                self.scorer.warn_without_labels(state)
        self._check_images(inputs)
        state = state.for_call(inputs.rows, inputs.lengths)
        # A generate call has set its scores once for all of its forwards.
        if override is not None and generation is None:
            packed = inputs.packed_prompts(override.rows) if scored and override.rows > 1 else None
            state = override.apply(state, packed)
        return state

    def _coefficients(self, module: nn.Module) -> dict[str, tuple[float, float]]:
        """The coefficients of the router losses of each active adapter that has some, in training."""
        if not (module.training and torch.is_grad_enabled()):
            return {}
        configs = {name: self.adapters.configs[name] for name in self.adapters.active()}
        pairs = {name: (each.balance_loss_coef, each.router_z_loss_coef) for name, each in configs.items()}
        return {name: pair for name, pair in pairs.items() if any(pair)}

    def _attended(self, inputs: Inputs) -> Tensor | None:
        """The mask (B, T) of tokens that count in all layers; None where layers see different tokens."""
        two_sided = getattr(getattr(self.adapters.base, "config", None), "is_encoder_decoder", False)
        mask = inputs.mask
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 and not two_sided else None

    def _override(self, chosen: Any, names: list[str]) -> Override | None:
        """What takes the place of these adapters' scores: the argument of a call, or the block around it."""
        around = self.channel.running.override
        if chosen is None and around is None:
            return None
        # A call with disabled adapters asks for the base model, and gets it.
        if not names:
            if not all(layer.disable_adapters for _, layer in self.adapters.layers()):
                find_steerable(self.adapters)
            return None
        return around if chosen is None else resolve(self.scorer, chosen, names)

    def _check_images(self, inputs: Inputs) -> None:
        """Refuse batches whose rows have different numbers of images: a layer would take each image for a row."""
        ids, base = inputs.ids, self.adapters.base
        token = getattr(getattr(base, "config", None), "image_token_id", None)
        if token is None or inputs.rows == 1 or not isinstance(ids, Tensor) or inputs.pixels is None:
            return
        counts = (ids == token).sum(-1)
        if (counts == counts[0]).all():
            return
        embedding = self.adapters.embedding()
        head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
        parts = [part for part in base.modules() if isinstance(part, PreTrainedModel)]
        text = [set(part.modules()) for part in parts if any(module is embedding for module in part.modules())]
        inside = {head, *min(text, key=len)} if text else set()
        outside = next((name for name, layer in self.adapters.layers() if layer not in inside), None)
        if outside is not None:
            raise ValueError(
                f"The prompts hold different numbers of image tokens, {counts.tolist()}, so the layer {outside} "
                "cannot tell which prompt an image belongs to. Leave the layers that see images out with "
                "exclude_modules, call the model with one prompt at a time, or set use_prior=False."
            )

    def _close(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After a forward, which may have failed: keep its state with its cache, and add the router losses."""
        running = self.channel.running
        if running.owner is not module:
            return None
        state, running.state, running.owner = running.state, None, None
        encoded = output if hasattr(output, "last_hidden_state") else None
        for carrier in (*caches_in(output), encoded):
            # A tuple cannot carry anything.
            if state is not None and hasattr(carrier, "__dict__"):
                setattr(carrier, KEPT_PRIOR, state.kept())
        if state is None or state.losses is None or output is None:
            return None
        return self._add_losses(state.losses, output)

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

    def _kept(self, inputs: Inputs, names: list[str], override: Override | None) -> ForwardState | None:
        """The state of the prompt that a cache, or an encoder's output, among the inputs was computed from."""
        caches = [cache for cache in inputs.caches if cached_tokens(cache) != 0]
        for source in (*caches, inputs.encoded):
            state = getattr(source, KEPT_PRIOR, None)
            if state is not None and set(names) <= set(state.scores):
                return state
        if caches and (override is None or not all(override.covers(name) for name in names)):
            self.scorer.warn_once(
                "cache",
                "A forward goes on from a cache whose prompt T-REX did not see; the prior is computed from the tokens "
                "of this call alone. Use generate, or run the prompt through the same model first.",
            )
        return None

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the prior computed once, from the prompt, for all new tokens."""
        embeds, chosen = kwargs.pop(EMBEDS, None), kwargs.pop(SEMANTIC_PRIOR, None)
        names = self.adapters.running()
        override = self._override(chosen, names)
        running, generate = self.channel.running, self._wrapped["generate"][0]
        if not names or running.generation is not None:
            return generate(*args, **kwargs)
        state = self._state_of_generate(args, kwargs, embeds, names, override)
        running.generation = state if override is None else override.apply(state, None)
        try:
            return generate(*args, **kwargs)
        finally:
            running.generation = running.state = running.owner = None

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's continuous batching, which writes requests one after the other without saying where."""
        if self.adapters.running():
            raise NotImplementedError(
                "T-REX does not support generate_batch: it does not tell which prompt a token belongs to. Use "
                "generate with a padded batch, or train with use_prior=False."
            )
        return self._wrapped["generate_batch"][0](*args, **kwargs)

    def _state_of_generate(
        self, args: tuple, kwargs: Mapping[str, Any], embeds: Any, names: list[str], override: Override | None
    ) -> ForwardState:
        """The state for a whole generate call: all that it gets is prompt."""
        prompt = dict(kwargs)
        if prompt.get("input_ids") is None:
            prompt["input_ids"] = args[0] if args else kwargs.get("inputs")
        inputs = replace(Inputs.of(prompt), labels=None, completion_mask=None, positions=None)
        goes_on = inputs.encoded is not None if inputs.tokens is None else _goes_on(inputs)
        if embeds is None and goes_on and (kept := self._kept(inputs, names, override)) is not None:
            return kept
        # Without any of these, generation starts from nothing, and an empty prompt has no prior.
        if embeds is None and inputs.tokens is None and inputs.encoded is None:
            return ForwardState(dict.fromkeys(names), 1)
        if inputs.mask is None and inputs.ids is not None:
            inputs = replace(inputs, mask=self._infer_attention_mask(inputs.ids, kwargs))
        if inputs.tokens is None and isinstance(embeds, Tensor):
            inputs = replace(inputs, rows=len(embeds))
        self._check_images(inputs)
        return self.scorer.score(inputs, embeds, names, override)

    def _infer_attention_mask(self, prompt: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What transformers takes where none is given: padding equals the pad token, if that is not an end token."""
        base: Any = self.adapters.base
        config = kwargs.get("generation_config") or base.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        end = kwargs.get("eos_token_id", config.eos_token_id)
        ends = end if isinstance(end, (list, tuple)) else [end]
        return None if pad is None or pad in ends else prompt != pad


def _goes_on(inputs: Inputs) -> bool:
    """Whether a generate call's tokens only go on from a cache: the prompt is what the cache was computed from."""
    cached = next((cached_tokens(cache) for cache in inputs.caches), None)
    tokens = inputs.tokens.shape[1]
    return bool(cached) and (tokens <= cached or (inputs.mask is not None and inputs.mask.shape[1] > tokens))
