"""One new token at a time: what is kept of its prompt equals the formula, and goes as soon as something changes."""

import pytest
import torch
from conftest import CACHE, adapted, prompts
from transformers import DynamicCache

import peft_trex.layer
from peft_trex import TRexLayer, steer_trex
from peft_trex.fast.one_token import OneToken

FORMS = {
    "recommended": {"use_router": False, "shared_core": True},
    "router": {},
    "router, no prior": {"use_prior": False, "fit": False},
    "paired": {"expert_layout": "paired", "r_a": 3, "r_b": 3, "prior_map": "learned"},
    "paired, no router": {"expert_layout": "paired", "r_a": 3, "r_b": 3, "use_router": False, "prior_map": "learned"},
    "reduced router": {"router_rank": 2},
    "top 2": {"router_top_k": 2},
    "prior above the token": {"prior_scale": 30.0},
}


def _twins(form, **settings):
    return [adapted(**FORMS[form], **settings, mixture_implementation=each) for each in ("auto", "reference")]


class Chat:
    """Decoding by hand."""

    def __init__(self, model, ids):
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.next(ids)

    @torch.no_grad()
    def next(self, ids):
        return self.model(input_ids=ids, **{CACHE: self.cache}, use_cache=True).logits[:, -1]


@pytest.mark.parametrize("form", FORMS)
def test_tokens_by_hand_equal_the_formula(form):
    ids = prompts(2, seed=5)
    answers = prompts(4, seed=6)[:, :3]
    found = []
    for model in _twins(form):
        first, second = Chat(model, ids[:1]), Chat(model, ids[1:, :4])
        logits = [first.next(answers[:1, :1]), first.next(answers[:1, 1:2])]
        # Another prompt comes between two tokens, and then a batch.
        logits += [second.next(answers[1:2, :1]), first.next(answers[:1, 2:])]
        with torch.no_grad():
            logits.append(model(input_ids=ids[:, :1]).logits[:, -1])
        logits.append(second.next(answers[1:2, 1:2]))
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["recommended", "router"])
def test_what_a_prompt_has_in_common_is_made_once(form, monkeypatch):
    made = []

    class Counted(OneToken):
        def __init__(self, *arguments):
            made.append(None)
            super().__init__(*arguments)

    monkeypatch.setattr(peft_trex.layer, "OneToken", Counted)
    model = _twins(form)[0]
    layers = sum(isinstance(module, TRexLayer) for module in model.modules())
    ids = prompts(2, seed=5)
    chat = Chat(model, ids[:1])
    assert not made
    for token in ids[1, :3]:
        chat.next(token[None, None])
    assert len(made) == layers
    with torch.no_grad():
        model.generate(input_ids=ids[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(made) == 2 * layers


def _change(layer, kind, replace):
    parameters = getattr(layer, kind)
    if "default" in parameters and replace:
        parameters["default"] = torch.nn.Parameter(parameters["default"].detach() + 0.05, requires_grad=False)
    elif "default" in parameters:
        with torch.no_grad():
            parameters["default"].add_(0.05)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("form", ["recommended", "router"])
@pytest.mark.parametrize(
    "kind", ["trex_A", "trex_B", "trex_router", "trex_map", "trex_core", "trex_omega", "trex_gate"]
)
def test_a_change_between_two_tokens_counts(form, kind, replace):
    ids = prompts(2, seed=5)
    found = []
    for model in _twins(form):
        chat = Chat(model, ids[:1])
        before = chat.next(ids[1:, :1])
        for layer in [module for module in model.modules() if isinstance(module, TRexLayer)]:
            _change(layer, kind, replace)
        found.append(torch.cat([before, chat.next(ids[1:, 1:2])]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["recommended", "router"])
def test_a_steered_token_and_disabled_adapters_count(form):
    ids = prompts(2, seed=5)
    found = []
    for model in _twins(form):
        chat = Chat(model, ids[:1])
        logits = [chat.next(ids[1:, :1])]
        with steer_trex(model, 1):
            logits.append(chat.next(ids[1:, 1:2]))
        logits.append(chat.next(ids[1:, 2:3]))
        with model.disable_adapter():
            logits.append(chat.next(ids[1:, 3:4]))
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0][1], found[0][0], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_of_the_base_model(dtype):
    ids = prompts(2, seed=5)
    found = []
    for model in _twins("recommended"):
        for name, parameter in model.named_parameters():
            if ".trex_" not in name:
                parameter.data = parameter.data.to(dtype)
        chat = Chat(model, ids[:1])
        found.append(torch.cat([chat.next(ids[1:, place : place + 1]) for place in range(3)]).float())
    limit = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(*found, rtol=limit, atol=limit)


def test_the_base_layers_own_output_stays_as_it_is():
    model = _twins("recommended")[0]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    # What has hooks is called by itself.
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    chat = Chat(model, prompts(1))
    for token in range(3, 6):
        chat.next(torch.tensor([[token]]))
    for x, output in seen:
        torch.testing.assert_close(output, torch.nn.functional.linear(x, layer.base_layer.weight))


def test_a_deleted_adapter_leaves_nothing_behind():
    model = _twins("recommended")[0]
    Chat(model, prompts(1)).next(torch.tensor([[5]]))
    layers = [module for module in model.modules() if isinstance(module, TRexLayer)]
    assert all(layer._kept for layer in layers)
    model.delete_adapter("default")
    assert not any(layer._kept for layer in layers)
