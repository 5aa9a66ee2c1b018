"""omega and gate as Python numbers, which cost less on a CPU than tensors of one element."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ..mixture import Experts, Settings


class Scales(NamedTuple):
    """The factors of softmax and prior, gate included, as the larger of the two and both divided by it."""

    larger: float
    token: float
    prior: float


class Shares(NamedTuple):
    """omega and gate as numbers."""

    omega: float
    gate: float

    @classmethod
    def of(cls, experts: Experts, settings: Settings) -> Shares:
        temperature = settings.temperature
        return cls(_sigmoid(temperature * float(experts.omega)), _sigmoid(temperature * float(experts.gate)))  # type: ignore[arg-type]

    def scales(self, prior: Tensor | None, settings: Settings) -> Scales:
        token = self.gate * (self.omega * settings.token_scale)
        by_prior = 0.0 if prior is None else self.gate * ((1 - self.omega) * settings.prior_scale)
        larger = token if token > by_prior else by_prior
        return Scales(larger, token / larger, by_prior / larger) if larger else Scales(0.0, 1.0, 1.0)

    def gradients(self, token: float, prior: float, settings: Settings) -> tuple[float, float]:
        """Gradients of both logits, from what router and prior contribute to the sum of m * dm."""
        return (
            settings.temperature * ((1 - self.omega) * token - self.omega * prior),
            settings.temperature * (1 - self.gate) * (token + prior),
        )


def _sigmoid(z: float) -> float:
    # The exponent is never positive, so that nothing overflows.
    decayed = math.exp(-abs(z))
    return 1 / (1 + decayed) if z > 0 else decayed / (1 + decayed)
