"""The one arrow from the model down to its layers, and how it survives gradient checkpointing.

Axis legend: B rows of a batch, T tokens, K clusters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .history import History
from .order import Order
from .rows import RowAdapters
from .state import ForwardState, Generation, Override


@dataclass
class Frame:
    """A forward that runs.

    Attributes:
        module: whose forward it is.
        state: what its layers read.
        tokens: the number of ids in its call; None for one without ids.
        caches: those that it goes on from.
        history: what a cache in its output will carry.
        outer: the forward around it.
        entered: whether the module's own code runs.
    """

    module: nn.Module
    state: ForwardState | None = None
    tokens: int | None = None
    caches: tuple[Any, ...] = ()
    history: History | None = None
    outer: Frame | None = None
    entered: bool = False


class _Running(threading.local):
    """What runs now, in each thread by itself: servers call one model from several. A copy starts with nothing.

    `state` is what layers read, that of the innermost forward in `frame`; `generation` is the generate call around it.
    `hidden` is what an attention with relative positions was called with, while it runs. `blocks` are those of
    `steer_trex` that were entered in this thread, for compiled forwards, which cannot read a context variable. `rows`
    are the adapters of the rows, where a call names one for each.
    """

    def __init__(self) -> None:
        # Each thread calls this anew. Attributes of the class would do, but torch.compile goes wrong on them.
        self.state: ForwardState | None = None
        self.frame: Frame | None = None
        self.generation: Generation | None = None
        self.hidden: tuple[Tensor, ...] = ()
        self.blocks: tuple[Block, ...] = ()
        self.rows: RowAdapters | None = None

    def __deepcopy__(self, memo: Any) -> _Running:
        return _Running()

    def __reduce__(self) -> Any:
        return _Running, ()


@dataclass(eq=False)
class Block:
    """A block of `steer_trex`, told from others by identity.

    Attributes:
        override: what it sets.
        runs: whether it has begun and not ended. Each is one assignment, which an interrupt cannot cut: a block that
            does not run counts nowhere.
        astray: whether it was entered while another block ran in this thread, but not around it.
    """

    override: Override
    runs: bool = False
    astray: bool = False


def _running_blocks(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    return tuple(block for block in blocks if block.runs)


class Blocks:
    """The blocks of `steer_trex` around what runs now, by context: coroutines and `asyncio.to_thread` have their own.

    A copy starts with none.
    """

    def __init__(self, running: _Running) -> None:
        self._running = running
        self._variable: ContextVar[tuple[Block, ...]] = ContextVar("steer_trex", default=())

    def enter(self, block: Block) -> None:
        """Begin a block."""
        around, inside = _running_blocks(self._variable.get()), _running_blocks(self._running.blocks)
        block.astray = around != inside
        self._variable.set((*around, block))
        self._running.blocks = (*inside, block)
        block.runs = True

    def leave(self, block: Block) -> None:
        """End a block, and no other one, in whatever order blocks end."""
        block.runs = False
        self._variable.set(_running_blocks(self._variable.get()))
        self._running.blocks = _running_blocks(self._running.blocks)

    def innermost(self) -> Override | None:
        """What the innermost block sets, None outside of all."""
        if not torch.compiler.is_compiling():
            blocks = _running_blocks(self._variable.get())
            return blocks[-1].override if blocks else None
        blocks = _running_blocks(self._running.blocks)
        if any(block.astray for block in blocks):
            raise ValueError(
                "Several steer_trex blocks run in this thread, one not within the other, and a compiled forward "
                "cannot tell which is its own; give the call its semantic_prior instead."
            )
        return blocks[-1].override if blocks else None

    def __deepcopy__(self, memo: Any) -> Blocks:
        return Blocks(deepcopy(self._running, memo))

    def __reduce__(self) -> Any:
        return Blocks, (self._running,)


class PriorChannel:
    """The one arrow from the model down to its layers: the prior of the forward that is running now.

    A layer asks for its rows of it; outside of a forward there is none. Gradient checkpointing runs a layer again when
    its forward is over, and perhaps another one in between: `run` gives such a call the prior it had the first time.
    """

    def __init__(self, priors: nn.ModuleDict) -> None:
        self.priors = priors
        self.running = _Running()
        self.blocks = Blocks(self.running)
        self.calibrated: set[str] = set()  # adapters whose layers hold static weights

    def run(self, state: ForwardState | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` as part of the forward that `state` belongs to."""
        before, self.running.state = self.running.state, state
        try:
            return function(*args, **kwargs)
        finally:
            self.running.state = before

    def fitted(self, adapter_name: str) -> bool:
        return adapter_name in self.priors and self.priors[adapter_name].fitted  # type: ignore[return-value]

    def mean_scores(self, adapter_name: str) -> Tensor | None:
        """(K,), or None while the prior is not fitted."""
        return self.priors[adapter_name].mean_scores if self.fitted(adapter_name) else None  # type: ignore[return-value]

    def is_position(self, x: Tensor) -> bool:
        """Whether the input of a layer that takes both is relative positions (1, L, D), not hidden states."""
        hidden = self.running.hidden
        return bool(hidden) and x.shape[0] == 1 and not any(x is each for each in hidden)

    def scores(self, adapter_name: str, x: Tensor, order: Order | None = None) -> Tensor | None:
        """Scores (B, K), (1, K) or (B, T, K) that go with a layer's input `x` (B, ..., D_in); None counts as zero.

        For an input (T, B, D_in), which a layer that has an `order` may get, they are (T, B, K).
        """
        state = self.running.state
        if state is None:
            if not self.fitted(adapter_name):
                return None
            raise RuntimeError(
                "A T-REX layer ran outside of a forward of its model, so the prompt's prior is not known. Call the "
                "model itself; if an activation checkpointing other than transformers' calls the layers again, use "
                "model.activation_checkpointing_enable() instead (gradient_checkpointing_enable() before "
                "transformers 5.24)."
            )
        scores = state.scores.get(adapter_name)
        if scores is None:
            return None
        # A model may be spread over several devices.
        if scores.device != x.device:
            scores = scores.to(x.device)
        rows = scores.shape[0]
        if order is not None and order.is_turned(x, state.rows):
            scores = scores if scores.dim() == 3 else scores[:, None].expand(-1, x.shape[0], -1)
            if scores.shape[:2] in ((1, x.shape[0]), (state.rows, x.shape[0])):
                return scores.expand(state.rows, -1, -1).transpose(0, 1)
        # Relative positions, for instance, are the same for all rows.
        if x.dim() > 2 and x.shape[0] == 1 < state.rows:
            return None
        if scores.dim() == 3:
            if x.shape[:-1] == scores.shape[:-1]:
                return scores
            if x.dim() == 2 and x.shape[0] == rows * scores.shape[1]:
                return scores.flatten(0, 1)
        elif rows in (1, x.shape[0]):
            return scores
        elif x.dim() == 2 and any(x.shape[0] == rows * length for length in state.lengths):
            return scores.repeat_interleave(x.shape[0] // rows, dim=0)  # (B * T, K)
        raise ValueError(
            f"A T-REX layer got an input of shape {tuple(x.shape)} in a forward of {rows} prompts; it cannot tell "
            "which prompt each row belongs to. Leave such modules (routed experts, for instance) out with "
            "exclude_modules, or set use_prior=False."
        )


class CheckpointWithPrior:
    """A checkpoint function, of transformers' activation checkpointing, whose second run sees the first's prior."""

    def __init__(self, checkpoint: Callable[..., Any], channel: PriorChannel) -> None:
        self.checkpoint = checkpoint
        self.channel = channel

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state, channel, differentiable = self.channel.running.state, self.channel, torch.is_grad_enabled()

        def rerun(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if differentiable and not torch.is_grad_enabled() and state is not None and state.losses is not None:
                raise ValueError(
                    "Reentrant gradient checkpointing first runs layers without gradients, where balance_loss_coef "
                    "and router_z_loss_coef have no effect. Enable it with use_reentrant=False, or set both to 0."
                )
            return channel.run(state, function, *inner_args, **inner_kwargs)

        # A layer's bound method tells whose it is, and some checkpoint functions (LLaMA-Factory's) ask.
        owner = getattr(getattr(function, "func", function), "__self__", None)
        if owner is not None:
            rerun.__self__ = owner  # type: ignore[attr-defined]
        return self.checkpoint(rerun, *args, **kwargs)
