"""One loop over a user's data, for all that watches an adapter run; the model is left as it was.

Axis legend: B rows of a batch, T tokens, D_in a layer's input width.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from .model import TRexModel
from .prior.inputs import Inputs
from .undo import Modes, Snapshot


def check_count(name: str, value: Any, least: int = 1, none: bool = True) -> None:
    """Raise a ValueError unless `value` is a whole number of at least `least`, or None where that is allowed."""
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{', or None' * none}.")


def check_unmerged(tuner: TRexModel, purpose: str) -> None:
    """Raise a ValueError if an adapter is merged into the model."""
    if any(layer.merged for layer in tuner.modules() if isinstance(layer, BaseTunerLayer)):
        raise ValueError(f"An adapter is merged into the model; call unmerge_adapter() before {purpose}.")


class Reading:
    """A block that reads batches, and leaves the CPU's global random states, which data loaders use, as they were.

    Other threads draw from these states, too, and would get the same numbers again when they are put back. So within
    the block the states are others, which follow from the former ones. The block stands within an `Undone` of itself.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self._states: tuple[Any, Any, Any] | None = None
        self._bar: Any = None

    def __enter__(self) -> Iterable[Any]:
        batches, most, title = self._data.batches, self._data.max_batches, self._data.title
        counts = [] if most is None else [most]
        # A stream has no length, and neither has its DataLoader.
        with suppress(TypeError):
            counts.append(len(batches))  # type: ignore[arg-type]
        self._states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch.default_generator.manual_seed(int(torch.randint(1 << 62, (), device="cpu")))
        np.random.seed(np.random.randint(1 << 31))
        random.seed(random.getrandbits(64))
        self._bar = tqdm(islice(batches, most), title, min(counts, default=None), disable=title is None)
        return self._bar

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def undo(self) -> None:
        """Put the random states back."""
        if self._states is not None:
            torch_state, numpy_state, python_state = self._states
            torch.set_rng_state(torch_state)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            self._states = None
        if self._bar is not None:
            self._bar.close()


@dataclass(frozen=True)
class Data:
    """Batches, of which the first `max_batches` are read (None: all); `title` is the progress bar's (None: no bar)."""

    batches: Iterable[Any]
    max_batches: int | None = None
    title: str | None = None


class DataPass:
    """A block in which an adapter alone is active, in eval mode and without gradients; it gives the batches.

    They are on the model's device. Modules that were compiled in place run as they were written, since hooks have no
    place in a compiled graph. The block stands within an `Undone` of itself, which takes away the hooks, too.

    Raises:
        TypeError: for a batch that is no mapping.
    """

    def __init__(self, tuner: TRexModel, adapter_name: str, data: Data) -> None:
        self._tuner = tuner
        self._adapter_name = adapter_name
        self._modes = Modes(tuner)
        self._running = Snapshot(tuner.prompts.channel.running)
        self._reading = Reading(data)
        self._gradients = torch.is_grad_enabled()
        self._eager: Any = None

    def __enter__(self) -> Iterator[dict[str, Any]]:
        tuner = self._tuner
        self._eager = torch.compiler.set_stance("force_eager")
        torch.set_grad_enabled(False)
        tuner.eval()
        tuner.set_adapter(self._adapter_name)
        tuner.enable_adapter_layers()
        return map(partial(_moved, tuner.prompts.adapters.home()), self._reading.__enter__())

    def __exit__(self, *_: Any) -> None:
        self._reading.undo()
        self._modes.restore()
        torch.set_grad_enabled(self._gradients)
        if self._eager is not None:
            self._eager.__exit__(None, None, None)

    def undo(self) -> None:
        """Leave the model as it was, also if the block, or a forward in it, has not ended as it should."""
        self._running.undo()
        self._modes.undo()
        self.__exit__()


def _moved(device: torch.device, batch: Any) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"The dataloader gave a {type(batch).__name__}; expected a mapping such as {{'input_ids': ...}}."
        )
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


class Attended(ExitStack):
    """Tells which tokens of the batch that runs are no padding, for each layer that gets them.

    Within its context it watches the encoder of an encoder-decoder model. `masks` holds the mask (B, T) of the input,
    or those of the encoder and then the decoder, as far as there are any.
    """

    def __init__(self, tuner: TRexModel) -> None:
        super().__init__()
        base: Any = tuner.model
        two_sided = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        self.masks: list[Tensor] = []
        self._encoder: Any = base.get_encoder() if two_sided else None
        # Cross-attention in the decoder reads this output of the encoder.
        self._encoded: Tensor | None = None

    def __enter__(self) -> Attended:
        if self._encoder is not None:
            self.enter_context(self._encoder.register_forward_hook(self._watch))
        return self

    def _watch(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._encoded = output[0]

    def start(self, inputs: Inputs) -> None:
        """Take the masks of the batch that will run."""
        tokens, mask = inputs.tokens, inputs.mask
        self._encoded = None if inputs.encoded is None else inputs.encoded[0]
        self.masks = [mask > 0] if isinstance(mask, Tensor) and mask.dim() == 2 else []
        if mask is None and isinstance(tokens, Tensor) and tokens.dim() == 2:
            # Packed rows may be filled up.
            self.masks = [inputs.prompts(causal=False).mask]
        if self._encoder is None:
            return
        decoded = inputs.decoder_mask
        if decoded is None and isinstance(inputs.labels, Tensor):
            # The decoder reads the labels, one place to the right.
            decoded = inputs.labels != -100
        if decoded is None and inputs.decoder_ids is not None:
            decoded = torch.ones_like(inputs.decoder_ids)
        if decoded is not None:
            self.masks.append(decoded > 0)

    def kept(self, x: Tensor, layer: Any) -> Tensor:
        """(...), bool, for a layer's input `x` (..., D_in): no padding; all tokens where no mask has these axes."""
        masks = self.masks
        if self._encoder is not None:
            of_encoder = x is self._encoded or any(layer is module for module in self._encoder.modules())
            masks = masks if of_encoder else masks[::-1]
        for mask in masks:
            order = getattr(layer, "order", None)
            if order is not None and order.is_turned(x, len(mask)):
                mask = mask.T
            if x.shape[:-1] in (mask.shape, (mask.numel(),)):
                return mask.to(x.device).reshape(x.shape[:-1])
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
