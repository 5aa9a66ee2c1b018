"""Which adapters have calibrated static weights, and when these no longer hold."""

from __future__ import annotations

import warnings

from ..undo import Snapshot, Undone
from .adapters import Adapters
from .channel import PriorChannel


class StaticWeights:
    """The calibrated static weights of a model's adapters, which their layers hold.

    Args:
        adapters: the model's.
        channel: what the layers read.
    """

    def __init__(self, adapters: Adapters, channel: PriorChannel) -> None:
        self.adapters = adapters
        self.channel = channel

    def calibrated(self) -> set[str]:
        """The adapters that have static weights."""
        return {name for _, layer in self.adapters.layers() for name in layer.trex_static.keys()}

    def forget(self, adapter_name: str) -> None:
        """Drop the static weights of an adapter, which has changed since: those of all layers or none."""
        layers, calibrated = [layer for _, layer in self.adapters.layers()], self.channel.calibrated
        prior = self.adapters.prior_of(adapter_name)
        held = [each for layer in layers for each in (layer.trex_static, layer.trex_kinship)]
        with Undone(Snapshot(calibrated, *held, *[] if prior is None else [prior])):
            for layer in layers:
                layer.keep_static(adapter_name, None)
            if prior is not None:
                prior.cells = None
            calibrated.discard(adapter_name)

    def forget_trained(self) -> None:
        """Before a training forward: drop the static weights of the adapters that it will change."""
        for name in self.calibrated():
            layers = self.adapters.layers_of(name).values()
            trained = any(parameter.requires_grad for layer in layers for parameter in layer.parameters_of(name))
            if trained and name in self.adapters.active() and not any(layer.merged for layer in layers):
                self.forget(name)
                warnings.warn(
                    f"The adapter {name!r} is trained again, so its static weights were dropped; call "
                    "calibrate_trex_merge anew before it is merged or exported.",
                    stacklevel=2,
                )
