"""One loop over a user's data, for all that watches an adapter run; the model is left as it was.

Axis legend: B rows of a batch, T tokens, D_in a layer's input width.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from .model import TRexModel
from .prior.inputs import Inputs


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


@dataclass(frozen=True)
class Data:
    """Batches, of which the first `max_batches` are read (None: all); `title` is the progress bar's (None: no bar)."""

    batches: Iterable[Any]
    max_batches: int | None = None
    title: str | None = None

    @contextmanager
    def read(self) -> Iterator[Iterable[Any]]:
        """Give the batches; the CPU's global random states, from which data loaders draw, are left as they were."""
        counts = [] if self.max_batches is None else [self.max_batches]
        # A stream has no length, and neither has its DataLoader.
        with suppress(TypeError):
            counts.append(len(self.batches))  # type: ignore[arg-type]
        numpy_state, python_state = np.random.get_state(), random.getstate()
        try:
            with torch.random.fork_rng(devices=[]):
                batches = islice(self.batches, self.max_batches)
                with tqdm(batches, self.title, min(counts, default=None), disable=self.title is None) as bar:
                    yield bar
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextmanager
def flags_kept(tuner: TRexModel) -> Iterator[None]:
    """Leave it as it was which parameters are trained."""
    flags = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def data_pass(tuner: TRexModel, adapter_name: str, data: Data) -> Iterator[Iterator[dict[str, Any]]]:
    """Give each batch on the model's device, while this adapter alone is active, in eval mode without gradients.

    Modules that were compiled in place run as they were written, since hooks have no place in a compiled graph.

    Raises:
        TypeError: for a batch that is no mapping.
    """
    home = tuner.prompts.adapters.home()
    active = list(tuner.active_adapters)
    disabled = any(layer.disable_adapters for layer in tuner.modules() if isinstance(layer, BaseTunerLayer))
    training = [(module, module.training) for module in tuner.modules()]

    def moved(batch: Any) -> dict[str, Any]:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"The dataloader gave a {type(batch).__name__}; expected a mapping such as {{'input_ids': ...}}."
            )
        return {key: value.to(home) if isinstance(value, Tensor) else value for key, value in batch.items()}

    eager = torch.compiler.set_stance("force_eager")
    with flags_kept(tuner), eager, torch.no_grad(), data.read() as batches:
        try:
            tuner.eval()
            tuner.set_adapter(adapter_name)
            tuner.enable_adapter_layers()
            yield map(moved, batches)
        finally:
            tuner.set_adapter(active)
            if disabled:
                with warnings.catch_warnings():
                    # PEFT warned of trained biases when the user disabled the adapter.
                    warnings.simplefilter("ignore")
                    tuner.disable_adapter_layers()
            for module, flag in training:
                module.training = flag


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
            if x.shape[:-1] in (mask.shape, (mask.numel(),)):
                return mask.to(x.device).reshape(x.shape[:-1])
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
