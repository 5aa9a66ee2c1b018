"""What the source of a module says of the layers in it: called, or passed by."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_trex import TRexConfig
from peft_trex.unsuited import bypassed


class Holder(nn.Module):
    def __init__(self, fused=False):
        super().__init__()
        self.proj, self.other, self.fused = nn.Linear(4, 4), nn.Linear(4, 4), fused


class Reads(Holder):
    def forward(self, x):
        return self.other(x) + torch.matmul(x, self.proj.weight.t())


class Hands(Holder):
    def forward(self, x):
        return self.other(x) + F.linear(x, self.proj.weight)


class Either(Holder):
    def forward(self, x):
        return self.other(x) + (F.linear(x, self.proj.weight) if self.fused else self.proj(x))


class Multiplies(Holder):
    def forward(self, x):
        return self.other(x) + (x @ self.proj.weight if self.fused else self.proj(x))


class ReadsBeside(Holder):
    def forward(self, x):
        return self.other(x) + self.proj(x) * self.proj.weight.abs().mean()


class Asks(Holder):
    def forward(self, x):
        x = x.to(self.proj.weight.dtype)
        return self.other(x) + (self.proj(x) if isinstance(self.proj.weight, nn.Parameter) else x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Reads, {"proj": True}),
        (Hands, {"proj": True}),
        (Either, {"proj": False}),
        (Multiplies, {"proj": True}),
        (ReadsBeside, {}),
        (Asks, {}),
    ],
)
def test_the_source_tells_which_layers_are_passed_by(kind, expected):
    assert bypassed(kind) == expected


@pytest.mark.parametrize("kind", [Reads, Hands, Multiplies])
def test_a_layer_that_is_passed_by_is_left_out_or_refused(kind):
    model = get_peft_model(nn.Sequential(kind()), TRexConfig(use_prior=False))
    assert set(model.base_model.layers_of("default")) == {"0.other"}
    with pytest.raises(ValueError, match=rf"0.proj: its weight is read by the {kind.__name__} around it"):
        get_peft_model(nn.Sequential(kind()), TRexConfig(use_prior=False, target_modules=["proj", "other"]))


def test_a_layer_that_some_road_calls_may_be_named():
    model = get_peft_model(nn.Sequential(Either()), TRexConfig(use_prior=False, target_modules=["proj"]))
    assert set(model.base_model.layers_of("default")) == {"0.proj"}
