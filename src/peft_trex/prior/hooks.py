"""The one place where a prompt's prior is computed and handed down: it sees every forward and generate of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..undo import Snapshot, Undone
from .adapters import Adapters, find_pad_token
from .channel import CheckpointWithPrior, Frame, PriorChannel
from .conversation import Conversations, attended_before
from .first_step import FirstStep
from .guard import Guard
from .history import attach
from .inputs import COMPLETION, EMBEDS, SEMANTIC_PRIOR, Inputs, caches_in
from .losses import LossWatch
from .override import find_steerable, resolve
from .positions import PositionWatch
from .scorer import PromptScorer
from .state import ForwardState, Generation, Override
from .static import StaticWeights

# transformers 5.24 renamed the methods to `activation_checkpointing_enable` and so on, and kept this attribute.
CHECKPOINT = "_gradient_checkpointing_func"


class PromptWatch:
    """Computes the prior of each forward from its prompt, and opens the channel to the layers for as long as it runs.

    Its hooks sit on the base model, its encoder and decoder, and every `PreTrainedModel` in it, and the outermost of a
    call counts: some callers run the backbone, and `generate` runs an encoder, without the model around it. So they
    see each call, whether or not `PeftModel` passes it through the tuner. `generate` itself is wrapped as well,
    because it calls the model with ever more than the prompt, and refuses arguments that the base model's forward
    does not name.

    Args:
        adapters: the model's.
        channel: what the layers read.
    """

    def __init__(self, adapters: Adapters, channel: PriorChannel) -> None:
        self.adapters = adapters
        self.channel = channel
        self.scorer = PromptScorer(adapters)
        self.conversations = Conversations(self.scorer)
        self.losses = LossWatch(self.scorer)
        self.static = StaticWeights(adapters, channel)
        self.first_step = FirstStep(adapters, self.losses.check)
        self._handles: list[Any] = []
        # Transformers may run these modules under gradient checkpointing.
        self._checkpointed: list[Any] = []
        # Methods of the base model that are wrapped, and whether they stood in the object itself, not in its class.
        self._wrapped: dict[str, tuple[Any, bool]] = {}
        self._guards: list[Guard] = []
        # The arguments that the base model's forward names.
        self._named: frozenset[str] = frozenset()
        # The modules that a prior does not reach.
        self.outside: set[nn.Module] = set()

    @property
    def attached(self) -> bool:
        """Whether the base model is watched."""
        return bool(self._handles)

    def attach(self, *handles: Any) -> None:
        """Start to watch the base model; the handles of other hooks leave with its own."""
        base: Any = self.adapters.base
        self._named = frozenset(inspect.signature(type(base).forward).parameters)
        self._handles = [*handles, *PositionWatch(self.channel).attach(base)]
        # FSMT's halves are plain modules, and generate runs the encoder by itself.
        watched = {base, *((base.get_encoder(), base.get_decoder()) if self.adapters.two_sided else ())}
        for module in base.modules():
            if module in watched or isinstance(module, PreTrainedModel):
                self._handles += [
                    module.register_forward_pre_hook(self.open, with_kwargs=True),
                    module.register_forward_hook(self._close_unguarded, always_call=True),
                ]
                self._guards.append(Guard(self, module))
            if hasattr(module, "gradient_checkpointing"):
                self._checkpointed.append(module)
        for name, ours in (("generate", self._generate), ("generate_batch", self._generate_batch)):
            method = getattr(base, name, None)
            if callable(method):
                self._wrapped[name] = (method, name in vars(base))
                setattr(base, name, ours)

    def detach(self) -> None:
        """Leave the base model as it was."""
        for handle in self._handles:
            handle.remove()
        for guard in self._guards:
            guard.remove()
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
        self._handles, self._checkpointed, self._wrapped, self._guards = [], [], {}, []

    def open(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a forward: compute its state, unless it is part of a forward that runs; take out our arguments.

        These are `semantic_embeds`, `semantic_prior` and, unless the module names it as its own, `completion_mask`.
        """
        if module is self.adapters.base:
            # By a task_type PEFT passes arguments such as input_ids=None, which Whisper hands on to its decoder.
            kwargs = {name: value for name, value in kwargs.items() if value is not None or name in self._named}
        outer = self.channel.running.frame
        # An interrupt came between the hook that opened this frame and its forward.
        while outer is not None and not outer.entered and Guard.stands_for(outer.module):
            outer = outer.outer
        again = outer is not None and outer.module is module
        if again:
            # What ends this forward must not end the outer one of the same module.
            self._push(Frame(module, outer=outer))
        embeds, chosen, completion_mask = kwargs.pop(EMBEDS, None), kwargs.pop(SEMANTIC_PRIOR, None), None
        names_of = inspect.signature(module.forward).parameters if args or COMPLETION in kwargs else {}
        if COMPLETION in kwargs and COMPLETION not in names_of:
            completion_mask = kwargs.pop(COMPLETION)
        if outer is not None and not again and chosen is None and embeds is None:
            ids = kwargs.get("input_ids", args[0] if args and next(iter(names_of)) == "input_ids" else None)
            # In a graph with dynamic shapes, a comparison of sizes would fix them.
            compared = not torch.compiler.is_compiling() and not self.adapters.two_sided
            other = outer.tokens is not None and isinstance(ids, Tensor) and compared and ids.numel() != outer.tokens
            if not other:
                return args, kwargs
        if self.channel.calibrated and module.training and torch.is_grad_enabled():
            self.static.forget_trained()
        self.first_step.forward(module)
        names = self.adapters.running()
        override, coefficients = self._override(chosen, names), self.losses.coefficients(module)
        rows = self.channel.running.rows
        if not (names or coefficients or rows):
            return args, kwargs
        named = dict(zip(names_of, args, strict=False))
        inputs = Inputs.of({**named, **kwargs, COMPLETION: completion_mask})
        if rows is not None and outer is None:
            rows.check(inputs.rows)
        frame = Frame(module, ForwardState({}, inputs.rows, inputs.lengths), outer=outer)
        frame.tokens = inputs.ids.numel() if isinstance(inputs.ids, Tensor) else None
        frame.caches = inputs.caches
        if names and module not in self.outside:
            said = chosen is not None or embeds is not None
            generation = None if said else self._generation_of(names)
            if generation is not None and generation.continues(inputs):
                frame.state = generation.state(inputs).for_call(inputs.rows, inputs.lengths)
            else:
                conversation = self.conversations.forward(inputs, embeds, names, override, module.training)
                frame.state, frame.history = conversation
        if coefficients:
            assert frame.state is not None
            frame.state = replace(frame.state, losses=self.losses.start(coefficients, inputs))
        self._wrap_checkpoints()
        self._push(frame)
        return args, kwargs

    def _close_unguarded(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After a forward that other code has put in the place of the guarded one, and which may have failed."""
        frame = self.channel.running.frame
        return None if frame is None or frame.entered else self.close(module, output)

    def close(self, module: nn.Module, output: Any) -> Any:
        """After a forward: end it, keep its history with its cache, and add the router losses."""
        running = self.channel.running
        frame = running.frame
        if frame is None or frame.module is not module:
            return None
        running.frame = frame.outer
        running.state = None if frame.outer is None else frame.outer.state
        encoded = output if hasattr(output, "last_hidden_state") else None
        for carrier in (*frame.caches, *caches_in(output), encoded):
            if frame.history is not None and carrier is not None:
                attach(carrier, frame.history)
        if frame.state is None or frame.state.losses is None or output is None:
            return None
        return self.losses.end(frame.state.losses, output)

    def _push(self, frame: Frame) -> None:
        self.channel.running.frame, self.channel.running.state = frame, frame.state

    def _wrap_checkpoints(self) -> None:
        """Have layers that run under gradient checkpointing see this forward's state when they run again."""
        for module in self._checkpointed:
            if module.training and module.gradient_checkpointing:
                checkpoint = getattr(module, CHECKPOINT, None)
                if checkpoint is not None and not isinstance(checkpoint, CheckpointWithPrior):
                    setattr(module, CHECKPOINT, CheckpointWithPrior(checkpoint, self.channel))

    def _generation_of(self, names: list[str]) -> Generation | None:
        """The generate call that runs, if it is one of these adapters."""
        generation = self.channel.running.generation
        return generation if generation is not None and set(names) <= set(generation.scored.scores) else None

    def _override(self, chosen: Any, names: list[str]) -> Override | None:
        """What takes the place of these adapters' scores: the argument of a call, or the block around it."""
        around = self.channel.blocks.innermost()
        if chosen is None and around is None:
            return None
        # A call with disabled adapters asks for the base model, and gets it.
        if not names:
            if not all(layer.disable_adapters for _, layer in self.adapters.layers()):
                find_steerable(self.adapters)
            return None
        return around if chosen is None else resolve(self.scorer, chosen, names)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the prior computed once, from the prompt, for all new tokens."""
        embeds, chosen = kwargs.pop(EMBEDS, None), kwargs.pop(SEMANTIC_PRIOR, None)
        names = self.adapters.running()
        override = self._override(chosen, names)
        running, generate = self.channel.running, self._wrapped["generate"][0]
        outer, frame, state = running.generation, running.frame, running.state
        if not (names or running.rows):
            return generate(*args, **kwargs)
        inputs = self._inputs_of_generate(args, kwargs, embeds)
        if running.rows is not None:
            # The caller of this method takes the names of the rows away again.
            running.rows = running.rows.for_generate(inputs.rows)
        if not names:
            return generate(*args, **kwargs)
        attended = None if kwargs.get("attention_mask") is not None else attended_before(inputs)
        if attended is not None:
            inputs = replace(inputs, mask=attended)
            kwargs["attention_mask"] = attended.long()
        part_of = None if chosen is not None or embeds is not None else self._generation_of(names)
        if part_of is not None and part_of.content is not None and part_of.begins(inputs):
            # A model may draft its own tokens. It has the same prompts then, and a cache of its own.
            part_of = replace(part_of, cache=next(iter(inputs.caches), None), tokens=0)
        else:
            part_of = None
        generation = part_of or self.conversations.start(inputs, embeds, names, override)
        with Undone(Snapshot(running)):
            running.generation, running.frame, running.state = generation, None, None
            output = generate(*args, **kwargs)
            running.generation, running.frame, running.state = outer, frame, state
        if part_of is None:
            self.conversations.end(generation, output)
        return output

    def _generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's continuous batching, which writes requests one after the other without saying where."""
        if self.adapters.running():
            raise NotImplementedError(
                "T-REX does not support generate_batch: it does not tell which prompt a token belongs to. Use "
                "generate with a padded batch, or train with use_prior=False."
            )
        return self._wrapped["generate_batch"][0](*args, **kwargs)

    def _inputs_of_generate(self, args: tuple, kwargs: Mapping[str, Any], embeds: Any) -> Inputs:
        """The arguments of a generate call: all that it gets is prompt, and what it leaves out is the model's."""
        prompt, first = dict(kwargs), args[0] if args else kwargs.get("inputs")
        name = getattr(self.adapters.base, "main_input_name", "input_ids")
        if prompt.get(name) is None:
            prompt[name] = first
        inputs = replace(Inputs.of(prompt), labels=None, completion_mask=None, positions=None)
        if inputs.mask is None and isinstance(inputs.ids, Tensor):
            base: Any = self.adapters.base
            pad = find_pad_token(kwargs, kwargs.get("generation_config"), base.generation_config)
            inputs = inputs if pad is None else replace(inputs, mask=inputs.ids != pad)
        if inputs.tokens is None and isinstance(embeds, Tensor):
            inputs = replace(inputs, rows=len(embeds))
        return inputs
