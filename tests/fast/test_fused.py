"""The fast path against the readable formula: outputs and every gradient, and what it keeps for the backward pass."""

import copy
import math

import pytest
import torch
from conftest import adapted, answered, make_llama, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

import peft_trex.fast.autograd
import peft_trex.fast.dispatch
from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior
from peft_trex.fast.base import Base, separable
from peft_trex.fast.dispatch import add_mixture, add_stacked
from peft_trex.mixture import Experts, Settings, num_experts, rank_one_mixture

SCALES = {"token_scale": 6.0, "prior_scale": 4.0, "temperature": 100.0}


def draw(
    shape=(3, 5),
    d_in=16,
    d_out=20,
    r_a=2,
    r_b=3,
    layout="grid",
    prior="row",
    router_rank=None,
    dtype=torch.float64,
    seed=0,
):
    """Tensors of a random case, all of which ask for gradients; a prior that is "alone" has no router beside it."""
    generator = torch.Generator().manual_seed(seed)
    experts = num_experts(r_a, r_b, layout)
    alone, prior = prior.endswith(" alone"), prior.removesuffix(" alone")

    def randn(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    rows = {
        "none": None,
        "one": (1, experts),
        "row": (shape[0], experts),
        "token": (*shape, experts),
        "one for each place": (1, *shape[1:], experts),
    }[prior]
    tensors = {
        "result": randn(*shape, d_out),
        "x": randn(*shape, d_in),
        "A": randn(r_a, d_in, scale=d_in**-0.5),
        "B": randn(d_out, r_b),
        "router": None if alone else randn(experts, router_rank or d_in, scale=d_in**-0.5),
        "omega_logit": randn(1, scale=0.01),
        "gate_logit": randn(1, scale=0.01),
    }
    if rows is not None:
        tensors["prior"] = randn(*rows, scale=0.5)
    if router_rank and not alone:
        tensors["router_down"] = randn(router_rank, d_in)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def reference(tensors, **kwargs):
    rest = without("result", tensors)
    return tensors["result"] + rank_one_mixture(**rest, **kwargs).to(tensors["result"].dtype)


def fused(tensors, **kwargs):
    result, x = tensors["result"], tensors["x"]
    base = Base(x, None, result) if isinstance(result, torch.Tensor) else Base(x, result)
    return add_mixture(base, x, experts_of(tensors), tensors.get("prior"), Settings(**kwargs))


def stacked(tensors, **kwargs):
    prior = tensors.get("prior")
    return add_stacked(tensors["result"], tensors["x"], experts_of(tensors), prior, Settings(**kwargs))


def experts_of(tensors):
    names = ("A", "B", "router", "router_down", "omega_logit", "gate_logit")
    return Experts(*(tensors.get(name) for name in names))


def frozen_linear(d_in=16, d_out=20, bias=True, dtype=torch.float64):
    layer = torch.nn.Linear(d_in, d_out, bias).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / d_in**0.5)
    return layer.to(dtype)


def with_layer(function, layer):
    """The reference with what a layer makes of x in place of `result`, or the fast path, which makes that too."""

    def call(tensors, **kwargs):
        return function({**tensors, "result": layer if function is fused else layer(tensors["x"])}, **kwargs)

    return call


def without(name, tensors):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def run(function, tensors, seed=1, **kwargs):
    """Output and all gradients for a random gradient of the output."""
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output = function(tensors, **kwargs)
    # short enough for every precision to hold it
    outgoing = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(output.dtype)
    grads = torch.autograd.grad(output, list(tensors.values()), outgoing)
    return {"output": output.detach(), **dict(zip(tensors, grads, strict=True))}


def assert_equal(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        size = value.abs().max().item() if value.numel() else 0
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * max(1.0, size), msg=lambda text, name=name: f"{name}: {text}"
        )


ALONE = ["one alone", "row alone", "token alone"]
PRIORS = ["none", "one", "row", "token", "one for each place", *ALONE, "one for each place alone"]
SHAPES = [(3, 5), (1, 1), (2, 1), (1, 70), (7,), (2, 3, 4), (2, 83)]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["grid", "paired"])
def test_equals_the_formula(shape, layout, prior):
    if prior.startswith(("token", "one for each place")) and len(shape) != 2:
        pytest.skip("the formula takes such a prior for x (B, T, D_in) only")
    sizes = {"r_a": 3, "r_b": 3 if layout == "paired" else 5}
    tensors = draw(shape, layout=layout, prior=prior, **sizes)
    expected = run(reference, tensors, layout=layout, **SCALES)
    assert_equal(run(fused, tensors, layout=layout, **SCALES), expected)
    with torch.no_grad():  # without gradients, few tokens go another way
        assert_equal({"output": fused(tensors, layout=layout, **SCALES)}, {"output": expected["output"]})


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(
    ("layout", "rank", "top_k"), [("grid", None, None), ("paired", None, None), ("grid", 4, None), ("grid", None, 2)]
)
def test_one_product_with_a_and_the_router_equals_the_formula(shape, layout, prior, rank, top_k):
    if prior.startswith(("token", "one for each place")) and len(shape) != 2:
        pytest.skip("the formula takes such a prior for x (B, T, D_in) only")
    tensors = draw(shape, layout=layout, r_a=3, prior=prior, router_rank=rank)
    settings = {"layout": layout, "top_k": top_k, **SCALES}
    assert_equal(run(stacked, tensors, **settings), run(reference, tensors, **settings))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prior", ["none", "one", "row", "token", *ALONE])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 1), (7,), (2, 83)], ids=str)
@pytest.mark.parametrize(
    ("layout", "rank", "top_k"), [("grid", None, None), ("paired", None, None), ("grid", 4, None), ("grid", None, 2)]
)
def test_a_frozen_base_layer_is_computed_along(layout, rank, top_k, shape, prior, bias):
    if prior.startswith("token") and len(shape) != 2:
        pytest.skip("the formula takes such a prior for x (B, T, D_in) only")
    tensors = without("result", draw(shape, layout=layout, r_a=3, prior=prior, router_rank=rank))
    layer, settings = frozen_linear(bias=bias), {"layout": layout, "top_k": top_k, **SCALES}
    before = copy.deepcopy(layer.state_dict())
    expected = run(with_layer(reference, layer), tensors, **settings)
    assert_equal(run(with_layer(fused, layer), tensors, **settings), expected)
    with torch.no_grad():
        assert_equal({"output": with_layer(fused, layer)(tensors, **settings)}, {"output": expected["output"]})
    for name, parameter in layer.state_dict().items():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


def test_a_base_layer_and_an_input_without_gradient():
    tensors, layer = without("result", draw((2, 83))), frozen_linear()
    expected = run(with_layer(reference, layer), tensors, **SCALES)
    tensors = {name: tensor.detach().requires_grad_(name != "x") for name, tensor in tensors.items()}
    outgoing = torch.randn(expected["output"].shape, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    with_layer(fused, layer)(tensors, **SCALES).backward(outgoing)
    assert tensors["x"].grad is None
    found = {name: tensor.grad for name, tensor in without("x", tensors).items()}
    assert_equal(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("shape", [(3, 1), (2, 83)], ids=str)
@pytest.mark.parametrize("slow", [set(), peft_trex.fast.autograd.SHORT], ids=["in half precision", "without AVX-512"])
@pytest.mark.parametrize(
    ("base", "adapter", "autocast"),
    [
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float16, torch.float16, None),
        (torch.float32, torch.float32, torch.float16),
    ],
    ids=str,
)
def test_a_base_layer_in_low_precision(base, adapter, autocast, slow, shape, monkeypatch):
    """Against float64: at most twice the formula's own error, in outputs and every gradient."""
    monkeypatch.setattr(peft_trex.fast.autograd, "SLOW_ON_CPU", slow)
    tensors = {name: tensor.detach().to(adapter) for name, tensor in draw(shape, 64, 48, 4, 8).items()}
    tensors = {**without("result", tensors), "x": tensors["x"].to(base)}
    layer = frozen_linear(64, 48, dtype=base)

    def low(function):
        def call(tensors, **kwargs):
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                if function is reference and autocast is None:
                    tensors = {name: tensor.to(base) for name, tensor in tensors.items()}
                return with_layer(function, layer)(tensors, **kwargs)

        return call

    truth = run(with_layer(reference, copy.deepcopy(layer).double()), exact(tensors), **SCALES)
    formula, found = run(low(reference), tensors, **SCALES), run(low(fused), tensors, **SCALES)
    for name, error in distance(found, truth).items():
        assert found[name].dtype == (formula[name] if name == "output" else tensors[name]).dtype
        assert error <= 2 * distance(formula, truth)[name] + 1e-3 * truth[name].norm().item(), name
    with torch.no_grad():
        output = low(fused)(tensors, **SCALES)
    limit = 2 * distance(formula, truth)["output"] + 1e-3 * truth["output"].norm().item()
    assert (output.double() - truth["output"]).norm() <= limit and output.dtype == formula["output"].dtype


class OtherLinear(torch.nn.Linear):
    pass


def weight_of_another_kind(layer):
    class Other(torch.Tensor):
        pass

    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Other), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: layer.bias.requires_grad_(),
        lambda layer: setattr(layer, "forward", layer.forward),
        lambda layer: setattr(layer, "__class__", OtherLinear),
        weight_of_another_kind,
    ],
)
def test_a_base_layer_that_does_more_is_called(change):
    layer = frozen_linear()
    assert separable(layer)
    change(layer)
    assert not separable(layer)


def test_a_global_hook_calls_base_layers():
    layer = frozen_linear()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not separable(layer)
    finally:
        handle.remove()
    assert separable(layer) and not separable(torch.nn.Conv1d(1, 1, 1).requires_grad_(False))


def test_arguments_that_a_base_layer_does_not_know_are_not_dropped():
    layer = first_layer(adapted(fit=False))
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        layer(torch.ones(1, layer.in_features), scale=2)


@pytest.mark.parametrize("grad", [True, False])
def test_a_hook_on_a_base_layer_sees_its_output(grad):
    model = randomize(adapted(fit=True))
    layer, seen = first_layer(model), []
    inputs = answered(24)
    with torch.set_grad_enabled(grad):
        expected = model(**inputs).logits
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output.clone())))
        found = model(**inputs).logits
    torch.testing.assert_close(found, expected)
    [(x, output)] = seen
    torch.testing.assert_close(output, torch.nn.functional.linear(x, layer.base_layer.weight))


@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 1), (2, 83)], ids=str)
@pytest.mark.parametrize("prior", ["none", "row", "token"])
def test_the_strongest_experts(shape, prior, rank, top_k):
    tensors = draw(shape, prior=prior, router_rank=rank)
    expected = run(reference, tensors, top_k=top_k, **SCALES)
    assert_equal(run(fused, tensors, top_k=top_k, **SCALES), expected)
    with torch.no_grad():
        assert_equal({"output": fused(tensors, top_k=top_k, **SCALES)}, {"output": expected["output"]})


def test_the_strongest_of_equal_experts():
    """As at the start, where all logits are zero: one choice in every path."""
    tensors = draw((2, 3), prior="none")
    tensors["router"] = torch.zeros_like(tensors["router"]).requires_grad_()
    expected = run(reference, tensors, top_k=2, **SCALES)
    assert_equal(run(fused, tensors, top_k=2, **SCALES), expected)
    assert expected["router"][2:].abs().max() == 0 < expected["router"][:2].abs().max()
    first = {name: tensor[:1, :1] if name in ("x", "result") else tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        assert_equal({"output": fused(first, top_k=2, **SCALES)}, {"output": expected["output"][:1, :1]})


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 83)], ids=str)
@pytest.mark.parametrize("prior", ["none", "row", "token"])
def test_a_reduced_router(shape, prior):
    tensors = draw(shape, prior=prior, router_rank=4)
    expected = run(reference, tensors, **SCALES)
    assert_equal(run(fused, tensors, **SCALES), expected)
    with torch.no_grad():
        assert_equal({"output": fused(tensors, **SCALES)}, {"output": expected["output"]})


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    tokens=st.integers(1, 70),
    d_in=st.integers(1, 20),
    d_out=st.integers(1, 20),
    r_a=st.integers(1, 6),
    r_b=st.integers(1, 6),
    prior=st.sampled_from(["none", "one", "row", "token", *ALONE]),
    omega=st.floats(-0.5, 0.5),
    gate=st.floats(-0.5, 0.5),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula_on_whatever_comes(rows, tokens, d_in, d_out, r_a, r_b, prior, omega, gate, scale, seed):
    tensors = draw((rows, tokens), d_in, d_out, r_a, r_b, prior=prior, seed=seed)
    with torch.no_grad():
        tensors["omega_logit"].fill_(omega)  # up to e^-50, where a sigmoid's two sides differ by one side only
        tensors["gate_logit"].fill_(gate)
        for name in {"router"} & tensors.keys():
            tensors[name] *= scale  # and a softmax that is nearly one expert
    expected = run(reference, tensors, **SCALES)
    assert_equal(run(fused, tensors, **SCALES), expected)
    with torch.no_grad():
        assert_equal({"output": fused(tensors, **SCALES)}, {"output": expected["output"]})


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("prior", ["one", "one alone", "row alone"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)], ids=str)
def test_no_tokens_at_all(shape, prior, grad):
    tensors = draw(shape, prior=prior)
    with torch.set_grad_enabled(grad):
        output = fused(tensors, **SCALES)
    assert output.shape == (*shape, 20)
    if grad:
        assert_equal(run(fused, tensors, **SCALES), run(reference, tensors, **SCALES))


@pytest.mark.parametrize("prior", ["row", "row alone"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 83), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("logit", [40.0, -40.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grad", [False, True])
def test_logits_at_their_ends(shape, logit, prior, grad):
    tensors = draw(shape, prior=prior)
    for name in ("omega_logit", "gate_logit"):
        with torch.no_grad():
            tensors[name].fill_(logit)
        with torch.set_grad_enabled(grad):
            found, expected = fused(tensors, **SCALES), reference(tensors, **SCALES)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found.isnan().all() == math.isnan(logit)
        tensors = draw(shape, prior=prior)


def exact(tensors):
    return {name: tensor.detach().double() for name, tensor in tensors.items()}


def distance(found, truth):
    return {name: (found[name].double() - value).norm().item() for name, value in truth.items()}


@pytest.mark.parametrize("products", ["as on this machine", "in half precision"])
@pytest.mark.parametrize("prior", ["none", "row", "token", "row alone", "token alone"])
@pytest.mark.parametrize(
    "mode", ["all bf16", "all fp16", "bf16 base", "autocast", "autocast with a bf16 base", "fp16 autocast"]
)
@pytest.mark.parametrize("shape", [(3, 1), (3, 5), (2, 83)], ids=str)
def test_low_precision_errs_no_more_than_the_formula_does(shape, mode, prior, products, monkeypatch):
    """Against float64: at most twice the formula's own error at that precision, in outputs and every gradient."""
    if products == "in half precision":
        monkeypatch.setattr(peft_trex.fast.autograd, "SLOW_ON_CPU", set())
    short = torch.float16 if "fp16" in mode else torch.bfloat16
    tensors = {name: tensor.detach().float() for name, tensor in draw(shape, 64, 48, 4, 8, prior=prior).items()}
    if "all" in mode or "base" in mode:
        tensors = {
            name: tensor.to(short) if "all" in mode or name in ("x", "result") else tensor
            for name, tensor in tensors.items()
        }

    def low(function):
        def call(tensors, **kwargs):
            if function is reference and mode == "bf16 base":  # as the layer does
                tensors = {**tensors, "x": tensors["x"].float()}
            with torch.autocast("cpu", dtype=short, enabled="autocast" in mode):
                return function(tensors, **kwargs)

        return call

    truth = run(reference, exact(tensors), **SCALES)
    formula = run(low(reference), tensors, **SCALES)
    if mode == "bf16 base":  # the formula computes in float32 there, which is not the precision that is asked for
        formula = run(reference, {name: tensor.bfloat16() for name, tensor in tensors.items()}, **SCALES)
    found = run(low(fused), tensors, **SCALES)
    for name, error in distance(found, truth).items():
        assert found[name].dtype == tensors.get(name, tensors["result"]).dtype
        assert error <= 2 * distance(formula, truth)[name] + 1e-3 * truth[name].norm().item(), name
        assert error <= 0.05 * truth[name].norm().item(), name
    with torch.no_grad():
        output = low(fused)(tensors, **SCALES)
    limit = 2 * distance(formula, truth)["output"] + 1e-3 * truth["output"].norm().item()
    assert (output.double() - truth["output"]).norm() <= limit and output.dtype == tensors["result"].dtype


@pytest.mark.parametrize("shape", [(3, 5), (2, 83)], ids=str)
def test_nothing_it_gets_is_changed(shape):
    tensors = draw(shape)
    before = copy.deepcopy(tensors)
    fused(tensors, **SCALES).sum().backward()
    with torch.no_grad():
        fused(tensors, **SCALES)
    for name, tensor in before.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["grid", "paired"])
@pytest.mark.parametrize("rank", [None, 4])
def test_what_is_kept_for_the_backward_pass(layout, rank):
    """The input, what A and the router make of it, what B is applied to: nothing as wide as the output, no copy."""
    r_b = 3 if layout == "paired" else 5
    tensors = draw((2, 100), d_in=40, d_out=56, r_a=3, r_b=r_b, layout=layout, router_rank=rank, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = fused(tensors, layout=layout, **SCALES)
    given = {tensor.data_ptr() for name, tensor in tensors.items() if name != "result"}
    own = [tensor for tensor in kept if tensor.data_ptr() not in given]
    experts = num_experts(3, r_b, layout)
    *features, routed, mixed = (tuple(tensor.shape) for tensor in own)
    assert (features, routed, mixed) == ([(200, 3 + rank)] if rank else [], (3 + experts, 200), (200, r_b))
    assert len({tensor.untyped_storage().data_ptr() for tensor in own}) == len(own)
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in own)  # and nothing beside them
    assert tensors["x"].data_ptr() in {tensor.data_ptr() for tensor in kept}
    output.sum().backward()


@pytest.mark.parametrize("layout", ["grid", "paired"])
def test_what_is_kept_without_a_router(layout):
    """The input, what A makes of it, what B is applied to, and a core for each prompt."""
    r_b = 3 if layout == "paired" else 5
    tensors = draw((2, 100), d_in=40, d_out=56, r_a=3, r_b=r_b, layout=layout, prior="row alone", dtype=torch.float32)
    tensors = without("result", tensors)
    layer = frozen_linear(40, 56, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = with_layer(fused, layer)(tensors, layout=layout, **SCALES)
    given = {tensor.data_ptr() for tensor in (*tensors.values(), layer.weight)}
    wide = sorted(tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in given and tensor.numel() > 20)
    core = (2, num_experts(3, r_b, layout))
    assert [shape for shape in wide if shape[0] == 200] == [(200, 3), (200, r_b)]
    assert all(shape in ((200, 3), (200, r_b), core) for shape in wide)
    assert tensors["x"].data_ptr() in {tensor.data_ptr() for tensor in kept}
    output.sum().backward()


def test_gradients_only_of_what_asks_for_them():
    tensors = draw((2, 83))
    expected = run(reference, tensors, **SCALES)
    names = ("A", "B", "router", "omega_logit", "gate_logit")
    tensors = {name: tensor.detach().requires_grad_(name in names) for name, tensor in tensors.items()}
    outgoing = torch.randn(expected["output"].shape, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    fused(tensors, **SCALES).backward(outgoing)
    assert_equal({name: tensors[name].grad for name in names}, {name: expected[name] for name in names})
    assert all(tensors[name].grad is None for name in ("x", "result", "prior"))


def test_backward_within_autocast_is_the_same():
    tensors = {name: tensor.float() for name, tensor in draw((2, 83)).items()}
    expected = run(fused, tensors, **SCALES)
    output_outside = fused(leaves := {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}, **SCALES)
    outgoing = torch.randn(output_outside.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output_outside.backward(outgoing)
    assert_equal({n: t.grad for n, t in leaves.items()}, {n: expected[n] for n in leaves}, tolerance=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["grid", "paired"])
def test_without_a_router_evaluation_rounds_as_training_does(layout, autocast):
    """The weights are made in two places, and a checkpointed forward runs through both."""
    sizes = {"r_a": 4, "r_b": 4} if layout == "paired" else {}
    tensors = draw((3, 83), layout=layout, prior="row alone", **sizes)
    tensors = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        trained = fused(tensors, layout=layout, **SCALES)
        with torch.no_grad():
            assert torch.equal(fused(tensors, layout=layout, **SCALES), trained)
    assert trained.grad_fn is not None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shared_core", [False, True])
def test_autocast_does_not_round_the_prior(shared_core, compiled):
    layer = first_layer(adapted(use_router=False, prior_map="learned", shared_core=shared_core, num_clusters=6))
    scores = torch.randn(3, 6)
    expected = layer._prior("default", scores)
    prior_of = torch.compile(layer._prior, backend="aot_eager", fullgraph=True) if compiled else layer._prior
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior_of("default", scores), expected)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("shape", [(2, 83), (2, 1)])
def test_autocast_is_on_again_whatever_happens(shape):
    tensors = {name: tensor.float() for name, tensor in draw(shape).items()}
    broken = {**tensors, "A": tensors["A"][:, 1:]}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(shape[1] > 1):
        fused(tensors, **SCALES)
        assert torch.is_autocast_enabled("cpu")
        with pytest.raises(RuntimeError):
            fused(broken, **SCALES)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_a_second_derivative_is_refused_by_name():
    output = fused(draw(), **SCALES).sum()
    with pytest.raises(
        NotImplementedError, match=r"no second derivative.*create_graph=True.*mixture_implementation='ref"
    ):
        output.backward(create_graph=True)


def first_layer(model):
    return next(module for module in model.modules() if isinstance(module, TRexLayer))


@pytest.fixture
def calls(monkeypatch):
    """Which of the four ways layers went."""
    went = []
    for name in ("decode", "add_fused", "add_stacked", "apply_experts"):
        original = getattr(peft_trex.fast.dispatch, name)

        def call(*args, original=original, name=name, **kwargs):
            went.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(peft_trex.fast.dispatch, name, call)
    return went


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({}, "add_fused"),
        ({"mixture_implementation": "reference"}, "apply_experts"),
        ({"use_router": False}, "add_fused"),
        ({"use_router": False, "shared_core": True}, "add_fused"),
        ({"use_router": False, "prior_scope": "answer"}, "add_fused"),
        ({"use_router": False, "expert_layout": "paired", "r_a": 4, "r_b": 4}, "add_fused"),
        ({"use_prior": False}, "add_fused"),
        ({"router_rank": 3}, "add_fused"),
        ({"num_clusters": 5}, "add_fused"),
        ({"expert_layout": "paired", "r_a": 4, "r_b": 4}, "add_fused"),
    ],
    ids=str,
)
def test_a_model_takes_the_way_it_should_and_both_agree(settings, way, calls):
    settings = {"num_clusters": 6, **settings}
    fit = settings.get("use_prior", True)
    model = adapted(fit=fit, **settings).double().train()
    twin = adapted(fit=fit, **{**settings, "mixture_implementation": "reference"}).double().train()
    calls.clear()
    batch = answered(4)
    loss = model(**batch).loss
    loss.backward()
    assert set(calls) == {way}
    twin(**batch).loss.backward()
    assert calls[-1] == "apply_experts"
    torch.testing.assert_close(loss, twin(**batch).loss)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if parameter.requires_grad:
            size = other.grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-8 * max(1, size), msg=name)
    with torch.no_grad():
        prompt = batch["input_ids"][:, :5]
        torch.testing.assert_close(model.eval()(prompt).logits, twin.eval()(prompt).logits, rtol=1e-9, atol=1e-9)
    generate = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, **generate), twin.generate(prompt, **generate))


def test_several_active_adapters():
    model = adapted()
    model.add_adapter("other", TRexConfig(r_a=3, r_b=2, num_clusters=4, task_type="CAUSAL_LM"))
    randomize(model, "other", seed=5)
    initialize_trex_prior(model, [answered(16)], adapter_name="other", progress=False)
    model.base_model.set_adapter(["default", "other"])
    layer = first_layer(model)
    outputs = []
    for fast in (True, False):
        for each in model.modules():
            if isinstance(each, TRexLayer):
                each.trex_fused = {name: way and fast for name, way in each.trex_fused.items()}
        model.zero_grad()
        loss = model(**answered(4)).loss
        loss.backward()
        outputs.append((loss.detach(), *(layer.trex_A[name].grad.clone() for name in ("default", "other"))))
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert outputs[0][2].abs().max() > 0


def small(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4)).to(dtype)
    config = TRexConfig(use_prior=False, target_modules=["0"], init_weights=False, **kwargs)
    return get_peft_model(base, config).eval()


def test_the_formula_has_second_derivatives():
    model = small(mixture_implementation="reference")
    layer = first_layer(model)
    loss = model(torch.randn(3, 64)).square().sum()
    (grad,) = torch.autograd.grad(loss, layer.trex_A["default"], create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), layer.trex_B["default"])
    assert second.abs().max() > 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_is_traced_is_the_formula_with_one_product(calls):
    model, x = small(), torch.randn(3, 64)
    expected = model(x)
    assert calls == ["add_fused"]
    traced = torch.jit.trace(model, (x,), check_trace=False)
    assert calls[-1] == "add_stacked"
    torch.testing.assert_close(traced(2 * x), model(2 * x))
    calls.clear()
    graph = torch.export.export(model, (x,)).module()
    assert set(calls) == {"add_stacked"}
    torch.testing.assert_close(graph(x), expected)


def test_a_device_that_it_was_never_run_on_takes_the_formula(calls):
    assert small().to("meta")(torch.empty(3, 64, device="meta")).shape == (3, 4)
    assert calls == ["add_stacked"]


def test_bfloat16_is_not_copied_to_float32():
    """A bf16 base with fp32 adapters, PEFT's default: what is kept of the input is the input."""
    model = small(torch.bfloat16)
    layer = first_layer(model)
    assert layer.trex_A["default"].dtype == torch.float32
    x = torch.randn(128, 64).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = model(x)
    assert output.dtype == torch.bfloat16
    wide = [tensor for tensor in kept if tuple(tensor.shape) == (128, 64)]
    assert x.data_ptr() in {tensor.data_ptr() for tensor in wide}
    assert {tensor.dtype for tensor in wide} == {torch.bfloat16}
    output.float().sum().backward()
    assert layer.trex_A["default"].grad.dtype == torch.float32


def test_autocast_keeps_the_input_in_its_own_precision(monkeypatch):
    monkeypatch.setattr(peft_trex.fast.autograd, "SLOW_ON_CPU", set())
    tensors = {name: tensor.detach().float().requires_grad_() for name, tensor in draw((2, 83)).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fused(tensors, **SCALES)
    assert [tensor.dtype for tensor in kept if tensor.shape == tensors["x"].shape] == [torch.bfloat16]


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_parameters_that_a_wrapper_keeps_elsewhere(implementation):
    """FSDP with flat parameters, and the replicas of DataParallel, leave plain attributes where parameters were."""
    model, x = small(mixture_implementation=implementation, router_rank=3), torch.randn(3, 1, 64)
    with torch.no_grad():
        expected = model(x)
        layer = first_layer(model)
        for kind in layer.adapter_layer_names:
            kept = getattr(layer, kind)
            for name in list(kept._parameters):
                tensor = kept[name].detach()
                delattr(kept, name)
                setattr(kept, name, tensor)
        assert not list(layer.trex_A.parameters())
        assert torch.equal(model(x), expected)


def test_an_unknown_way_is_refused():
    with pytest.raises(
        ValueError, match=r"mixture_implementation='triton' is unknown; it must be one of auto, reference"
    ):
        TRexConfig(mixture_implementation="triton")


def test_dropout_reaches_the_fast_path():
    model = adapted(trex_dropout=0.5).train()
    batch = answered(4)
    torch.manual_seed(0)
    first = model(**batch).loss
    torch.manual_seed(0)
    again = model(**batch).loss
    assert first == again != model(**batch).loss
    twin = adapted(trex_dropout=0.5, mixture_implementation="reference").train()
    torch.manual_seed(0)
    torch.testing.assert_close(twin(**batch).loss, first)


@pytest.mark.parametrize("grad", [True, False])
def test_a_fresh_adapter_adds_nothing(grad):
    base, ids = make_llama(), answered(2)["input_ids"]
    with torch.set_grad_enabled(grad):
        expected = base(ids).logits
        model = get_peft_model(base, TRexConfig(r_a=2, r_b=3, use_prior=False, task_type="CAUSAL_LM")).eval()
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("shape", [(3, 1), (5, 4)], ids=str)
def test_tensors_that_are_not_contiguous(shape):
    tensors = {name: tensor.detach() for name, tensor in draw(shape).items()}
    expected = run(reference, tensors, **SCALES)
    for name in ("x", "result"):
        tensors[name] = torch.stack([tensors[name].transpose(0, 1)] * 2, -1)[..., 0].transpose(0, 1)
        assert not tensors[name].is_contiguous()

    with torch.no_grad():
        assert_equal({"output": fused(tensors, **SCALES)}, {"output": expected["output"]})
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    output = fused(leaves, **SCALES)
    outgoing = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    outgoing = outgoing.transpose(0, 1).contiguous().transpose(0, 1)
    grads = torch.autograd.grad(output, list(leaves.values()), outgoing)
    assert_equal({"output": output.detach(), **dict(zip(leaves, grads, strict=True))}, expected)


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize(
    "change",
    [lambda y: y.mul_(2), lambda y: y.view(-1, 32).transpose(0, 1).add_(1), lambda y: torch.relu_(y)],
    ids=["scaled", "of a view", "activated"],
)
def test_outputs_may_be_changed_in_place(shape, change):
    grads = []
    for implementation in ("auto", "reference"):
        model = small(mixture_implementation=implementation)
        layer = first_layer(model)
        layer.register_forward_hook(lambda module, args, output: change(output) is None or output)
        model(torch.ones(shape)).sum().backward()
        grads.append(layer.trex_A["default"].grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0
