"""Training by forwards alone: two of them along a drawn direction tell the slope, and no gradient is made."""

import pytest
import torch
from conftest import answered, exact_model
from torch.nn import functional as F

FORMS = [
    {},
    {"use_router": False, "shared_core": True, "prior_map": "learned"},
    {"expert_layout": "paired", "r_a": 3, "router_rank": 2},
]


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def move(parameters, distance, seed):
    """Go along a direction that its seed tells, so that nobody has to keep it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(distance * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def loss_of(model, batch):
    """The loss in float64; transformers takes the logits in float32."""
    logits = model(input_ids=batch["input_ids"], labels=batch["labels"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@torch.no_grad()
def slope(model, batch, seed, distance):
    """The slope of the loss along the direction, from both sides; the parameters are put back."""
    parameters, losses = trained(model), []
    for step in (distance, -2 * distance):
        move(parameters, step, seed)
        losses.append(float(loss_of(model, batch)))
    move(parameters, distance, seed)
    return (losses[0] - losses[1]) / (2 * distance)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_two_forwards_tell_the_slope(form):
    model = exact_model(**form).train()
    batch = answered(4)
    parameters = trained(model)
    gradients = torch.autograd.grad(loss_of(model, batch), parameters)
    assert all(gradient.any() for gradient in gradients)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in parameters]
        expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        # Norms and attention are in float32, which a shorter distance would feel. A longer one would feel the bend of
        # omega and the gate, whose logits are taken times 100.
        assert slope(model, batch, seed, 1e-4) == pytest.approx(expected, rel=0.02, abs=0.05)


def test_the_loss_falls_without_a_gradient():
    model = exact_model(target_modules=["down_proj", "v_proj"]).train()
    batch = answered(4)
    before = {name: one.clone() for name, one in model.named_parameters()}
    with torch.no_grad():
        first = float(loss_of(model, batch))
    for seed in range(300):
        move(trained(model), -2e-4 * max(-10.0, min(10.0, slope(model, batch, seed, 1e-5))), seed)
    with torch.no_grad():
        last = float(loss_of(model, batch))
    assert last < 0.8 * first
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]) != parameter.requires_grad
