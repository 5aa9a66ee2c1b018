"""The first training step says which adapted layers no forward has called, and only where that is a mistake."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from conftest import VOCAB, adapted, answered, make_llama, make_t5, prompts
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.optim import optimizer as optim

from peft_trex import TRexConfig, TRexLayer

SAID = "adapted layers have no part in the first training step"


class Reader(nn.Module):
    """It reads the weight of a layer in a way that its source does not tell."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.hidden = nn.Linear(8, 8)

    def forward(self, x):
        layers = dict(self.named_children())
        return F.linear(self.called(x), layers["hidden"].weight)


class Experts(nn.Module):
    """Experts in lists, of modules and of bare layers; the first of each gets all tokens."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.bare = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        return self.bare[0](self.experts[0](x))


class Towers(nn.Module):
    """A text model with a tower, which a batch without images does not use."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.text = nn.Linear(8, 8)

    def forward(self, x, image=None):
        return self.text(x if image is None else x + self.tower(image))


def _plain(module, **settings):
    settings = {"use_prior": False, "target_modules": "all-linear", **settings}
    return get_peft_model(module, TRexConfig(r_a=2, r_b=2, **settings)).train()


def _steps(model, batch, count=1, forwards=1):
    """Training steps; a loss of the model's, or the mean of what it returns."""
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(count):
        for _ in range(forwards):
            output = model(**batch) if isinstance(batch, dict) else model(batch)
            getattr(output, "loss", None if not isinstance(output, torch.Tensor) else output.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def _hooks(model):
    layers = [module for module in model.modules() if isinstance(module, TRexLayer)]
    return sum(len(layer._forward_pre_hooks) for layer in layers) + len(optim._global_optimizer_pre_hooks)


def test_a_layer_that_no_forward_calls_is_named_once():
    model = _plain(Reader())
    before = _hooks(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _steps(model, torch.ones(3, 8), count=3)
    gc.collect()
    (said,) = [str(warning.message) for warning in caught]
    assert said.startswith(f"1 {SAID}, such as hidden: what is around them ran") and "exclude_modules" in said
    assert _hooks(model) == before, "it costs nothing after the first step"


def test_a_single_step_says_it():
    with pytest.warns(UserWarning, match=f"1 {SAID}"):
        _steps(_plain(Reader()), torch.ones(3, 8))


def _checkpointed():
    model = adapted().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


QUIET = {
    "llama": lambda: (adapted().train(), answered(4)),
    "no prior": lambda: (adapted(use_prior=False, fit=False).train(), answered(4)),
    "checkpointing": lambda: (_checkpointed(), answered(4)),
    "encoder and decoder": lambda: (
        adapted("t5", base=make_t5()).train(),
        {"input_ids": prompts(4), "labels": prompts(4, 4)},
    ),
    "experts without tokens": lambda: (_plain(Experts()), torch.ones(3, 8)),
    "a tower without images": lambda: (_plain(Towers()), torch.ones(3, 8)),
    "left out": lambda: (_plain(Reader(), exclude_modules=["hidden"]), torch.ones(3, 8)),
}


@pytest.mark.parametrize("case", QUIET)
def test_no_false_alarm(case):
    model, batch = QUIET[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _steps(model, batch, count=2, forwards=2)


def test_all_forwards_before_the_step_count():
    """An image may come in the second of a step's batches."""

    class Both(Towers):
        def __init__(self):
            super().__init__()
            self.projector = nn.Linear(8, 8)

        def forward(self, x, image=None):
            return self.text(x) if image is None else self.text(self.projector(image))

    x = torch.ones(3, 8)
    for batches, said in (([{}, {"image": x}], False), ([{}, {}], True)):
        model = _plain(Both())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for batch in batches:
                model(x, **batch).mean().backward()
            optimizer.step()
        assert any("such as projector" in str(warning.message) for warning in caught) == said


def test_frozen_adapters_and_evaluation_are_not_watched():
    model = _plain(Reader())
    before = _hooks(model)
    model.eval()(torch.ones(3, 8))
    with torch.no_grad():
        model.train()(torch.ones(3, 8))
    assert _hooks(model) == before
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(3, 8))
        other = nn.Parameter(torch.ones(1, requires_grad=True))
        other.grad = torch.ones(1)
        torch.optim.SGD([other], lr=0.1).step()


def test_a_model_that_never_trains_is_not_kept():
    model = _plain(Reader())
    model(torch.ones(3, 8))
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_copies_made_between_the_forward_and_the_step_say_it_themselves():
    model = _plain(Reader())
    model(torch.ones(3, 8))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in (model, *copies):
        with pytest.warns(UserWarning, match=f"1 {SAID}"):
            _steps(one, torch.ones(3, 8))


@pytest.mark.slow
def test_compiled_models_are_left_alone():
    for compiled in (
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model.compile(backend="eager"),
    ):
        model = _plain(Reader())
        before = _hooks(model)
        torch._dynamo.reset()
        called = compiled(model)
        called = model if called is None else called
        called(torch.ones(3, 8))
        assert _hooks(model) == before


def test_compiled_blocks_are_left_alone():
    model = adapted(base=make_llama(vocab_size=VOCAB)).train()
    model.base_model.model.model.layers[0].mlp.compile(backend="eager")
    before = _hooks(model)
    model(**answered(4))
    assert _hooks(model) == before
