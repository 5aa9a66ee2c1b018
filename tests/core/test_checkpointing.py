"""Gradient checkpointing runs layers again when their forward is over: each run must see its own forward's prior."""

from functools import partial

import pytest
import torch
from conftest import MAKERS, adapted, answered, make_llama
from transformers import PreTrainedModel

from peft_trex.prior.channel import CheckpointWithPrior

KINDS = ["llama", "gpt2", "t5"]


def _gradients(model, losses):
    model.zero_grad()
    losses(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _one(model):
    return model(**answered(4, 0)).loss


def _two_before_one(model):
    """As in a contrastive loss: the second forward runs before the first is gone through backwards."""
    first, second = model(**answered(4, 0)), model(**answered(4, 1))
    return first.loss + 3 * second.loss


def _evaluation_between(model):
    loss = model(**answered(4, 0)).loss
    model.eval()
    with torch.no_grad():
        model(**answered(4, 2))
    model.train()
    return loss


@pytest.mark.parametrize("losses", [_one, _two_before_one, _evaluation_between])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_without_checkpointing(kind, reentrant, losses):
    model = adapted(kind, base=MAKERS[kind]().double()).train()  # so that rounding hides nothing
    model.config.use_cache = False
    expected = _gradients(model, losses)
    assert len(expected) > 10
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    found = _gradients(model, losses)
    checkpointed = [m for m in base.modules() if getattr(m, "gradient_checkpointing", False)]
    assert any(isinstance(m._gradient_checkpointing_func, CheckpointWithPrior) for m in checkpointed)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-8, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", ["gradient", "activation"])
def test_checkpointing_switched_off_and_on_again(name):
    """By the methods' names since transformers 5.24, and by those that they had before."""
    if not hasattr(PreTrainedModel, f"{name}_checkpointing_enable"):
        pytest.skip("this transformers knows the older name only")
    model = adapted(base=make_llama().double()).train()
    expected = _gradients(model, _one)
    base = model.get_base_model()
    for _ in range(2):
        getattr(base, f"{name}_checkpointing_enable")({"use_reentrant": False})
        base.enable_input_require_grads()
        assert any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
        found = _gradients(model, _one)
        for parameter in expected:
            torch.testing.assert_close(found[parameter], expected[parameter])
        getattr(base, f"{name}_checkpointing_disable")()
        _gradients(model, _one)


def test_the_prior_matters_to_these_gradients():
    """Guards the tests above: with another prompt's prior the gradients would be visibly different."""
    model = adapted().train()
    expected = _gradients(model, _one)
    model.base_model.trex_prior["default"].centroids.mul_(-1)
    found = _gradients(model, _one)
    assert any(not torch.allclose(found[name], expected[name], rtol=0.1) for name in expected)


def test_a_foreign_checkpoint_is_refused_rather_than_wrong():
    model = adapted().train()
    layer = model.base_model.model.model.layers[0]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        inner, *args, use_reentrant=False, **kwargs
    )
    model.get_base_model().enable_input_require_grads()
    loss = _one(model)
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        loss.backward()


@pytest.mark.parametrize("around", [partial, lambda method: method])
def test_a_checkpoint_function_may_ask_whose_method_it_runs(around):
    model = adapted().train()
    expected = _gradients(model, _one)
    layer, owners = model.base_model.model.model.layers[0].mlp, []

    def asking(function, *args):
        owners.append(function.__self__)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    inner, checkpoint = around(layer.forward), CheckpointWithPrior(asking, model.base_model.prompts.channel)
    layer.forward = lambda x: checkpoint(inner, x)
    found = _gradients(model, _one)
    assert owners == [layer]
    assert all(torch.allclose(found[name], expected[name]) for name in expected)
