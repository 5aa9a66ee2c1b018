"""What fits in the output or a gradient fits inside, too: float16 ends at 65504, on every path of the mixture."""

import pytest
import torch
from conftest import adapted, prompts

from peft_trex import rank_one_mixture
from peft_trex.fast.base import Base
from peft_trex.fast.dispatch import add_mixture, add_stacked
from peft_trex.fast.half import Factor
from peft_trex.mixture import Experts, Settings, apply_experts, mix_features, weigh_experts

HALF, LARGEST = torch.float16, torch.finfo(torch.float16).max
# sizes of x, B and the router, then token_scale and prior_scale
CASES = {
    "large input": (1e4, 0.02, 1e-4, 32.0, 4.0),
    "large token_scale, as of pruned layers": (1e3, 0.01, 0.1, 512.0, 4.0),
    "large prior_scale": (3e3, 1e-3, 0.1, 32.0, 3e3),
    "features and logits beyond the range": (5e4, 5e-4, 8.0, 32.0, 4.0),
    "small input": (1e-3, 0.05, 0.1, 32.0, 4.0),
}


def draw(name, layout="grid", rank=None, tokens=16):
    x_size, b_size, router_size, token_scale, prior_scale = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    r_a, r_b = (4, 8) if layout == "grid" else (8, 8)
    experts = r_a * r_b if layout == "grid" else r_a
    tensors = {
        "x": (normal(2, tokens, 64) * x_size).clamp(-6e4, 6e4),
        "A": normal(r_a, 64) / 8 * (4 if "beyond" in name else 1),
        "B": normal(48, r_b) * b_size,
        "router": normal(experts, rank or 64) * router_size,
        "prior": normal(2, experts).clamp(-1, 1),
        "omega_logit": torch.tensor([0.001]),
        "gate_logit": torch.tensor([0.02]),
    }
    if rank:
        tensors["router_down"] = normal(rank, 64) / 8
    settings = Settings(token_scale, prior_scale, 100.0, layout)
    return {key: tensor.to(HALF) for key, tensor in tensors.items()}, settings


def parts(tensors):
    names = ("A", "B", "router", "router_down", "omega_logit", "gate_logit")
    return tensors["x"], Experts(*(tensors.get(name) for name in names)), tensors["prior"]


def formula(tensors, settings):
    x, experts, prior = parts(tensors)
    return apply_experts(x, experts, prior, settings)


def fast(tensors, settings):
    x, experts, prior = parts(tensors)
    zeros = x.new_zeros(*x.shape[:-1], len(experts.B), dtype=HALF)
    return add_mixture(Base(x, None, zeros), x, experts, prior, settings)


def fast_with_base(tensors, settings):
    x, experts, prior = parts(tensors)
    layer = torch.nn.Linear(64, len(experts.B), dtype=x.dtype).requires_grad_(False)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return add_mixture(Base(x, layer), x, experts, prior, settings)


def stacked(tensors, settings):
    x, experts, prior = parts(tensors)
    return add_stacked(x.new_zeros(*x.shape[:-1], len(experts.B), dtype=HALF), x, experts, prior, settings)


def compiled(tensors, settings):
    torch.compiler.reset()
    return torch.compile(stacked, backend="aot_eager", fullgraph=True)(tensors, settings)


PATHS = [formula, fast, fast_with_base, stacked, compiled]


def differentiate(path, tensors, settings, outgoing, autocast=False):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast("cpu", HALF, enabled=autocast):
        output = path(leaves, settings)
    gradients = torch.autograd.grad(output, list(leaves.values()), outgoing.to(output.dtype))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(found, exact, fits):
    """Whatever of the exact values fits is found, to float16's own precision."""
    for name in fits:
        assert found[name].isfinite().all(), name
        # Numbers below the smallest of float16 are rounded to multiples of it.
        error, smallest = (found[name].double() - exact[name]).norm(), 2.0**-24 * exact[name].numel() ** 0.5
        assert error <= 0.01 * exact[name].norm() + smallest, (name, error, exact[name].norm())


@pytest.mark.parametrize("mode", ["float16", "autocast"])
@pytest.mark.parametrize(("layout", "rank"), [("grid", None), ("paired", None), ("grid", 4)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_what_fits_does_not_overflow_inside(path, case, layout, rank, mode):
    tensors, settings = draw(case, layout, rank)
    outgoing = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1))
    exact = differentiate(formula, {name: t.double() for name, t in tensors.items()}, settings, outgoing.double())
    # Gradients are as large as what comes in: let the largest of x's just fit.
    outgoing = (outgoing * min(1.0, 3e4 / exact["x"].abs().max().item())).to(HALF)
    exact = differentiate(formula, {name: t.double() for name, t in tensors.items()}, settings, outgoing.double())
    assert exact["output"].abs().max() < LARGEST and exact["x"].abs().max() < LARGEST
    if mode == "autocast":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    found = differentiate(path, tensors, settings, outgoing, autocast=mode == "autocast")
    assert found["output"].dtype == HALF
    fits = [name for name, value in exact.items() if mode == "autocast" or value.abs().max() < LARGEST]
    check(found, exact, fits)


@pytest.mark.parametrize("case", [name for name in CASES if name != "small input"])
def test_the_cases_pass_the_range_inside(case):
    tensors, settings = draw(case)
    x, experts, prior = parts({name: tensor.double() for name, tensor in tensors.items()})
    a = x @ experts.A.T
    G = weigh_experts(a, x @ experts.router.T, prior, experts.omega, settings)
    gate = torch.sigmoid(100 * experts.gate)
    assert (gate * mix_features(a, G)).abs().max() > LARGEST


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", ["float16", "autocast"])
@pytest.mark.parametrize("layout", ["grid", "paired"])
@pytest.mark.parametrize("case", CASES)
def test_a_decoded_token_does_not_overflow_inside(case, layout, mode, rows):
    tensors, settings = draw(case, layout, tokens=1)
    tensors.update({name: tensors[name][:1].expand(rows, *tensors[name].shape[1:]) for name in ("x", "prior")})
    exact = formula({name: tensor.double() for name, tensor in tensors.items()}, settings)
    if mode == "autocast":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    with torch.no_grad(), torch.autocast("cpu", HALF, enabled=mode == "autocast"):
        check({"output": fast(tensors, settings)}, {"output": exact}, ["output"])


def test_a_gate_that_is_nearly_shut_keeps_a_decoded_token_in_range():
    tensors, settings = draw("large input", tokens=1)
    tensors["B"], tensors["gate_logit"] = tensors["B"] * 400, torch.tensor([-0.12], dtype=HALF)
    exact = formula({name: tensor.double() for name, tensor in tensors.items()}, settings)
    assert exact.abs().max() < LARGEST
    with torch.no_grad():
        check({"output": fast(tensors, settings)}, {"output": exact}, ["output"])


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_has_the_range(case):
    tensors, settings = draw(case)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    outgoing = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = differentiate(formula, {name: t.double() for name, t in tensors.items()}, settings, outgoing.double())
    x = tensors["x"]
    for path in (formula, lambda t, s: add_mixture(Base(x, None, x.new_zeros(2, 16, 48)), *parts(t), s)):
        found = differentiate(path, tensors, settings, outgoing)
        assert all(value.isfinite().all() for value in found.values())
        assert (found["output"].double() - exact["output"]).norm() < 0.05 * exact["output"].norm()


def test_the_public_formula_takes_float16():
    tensors, settings = draw("large input")
    options = settings._replace(layout="grid")._asdict()
    y = rank_one_mixture(**tensors, **options)
    assert y.dtype == HALF and torch.equal(y, formula(tensors, settings))


# what a GPU's products in float16 are made of


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, 1e7, 1e9])
def test_factors_hold_what_float16_does_not(size):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 6, generator=generator) * size
    values[::2] *= 1e-3 / size  # beside large tokens, small ones keep their precision
    other = (torch.randn(6, 20, generator=generator) * min(1.0, 1e3 / size)).to(HALF)
    factor = Factor.of(values, HALF)
    product = factor.factor.double() @ factor.matching(other).double()
    exact = values.double() @ other.double()
    error = (product - exact).norm(dim=1) / exact.norm(dim=1)
    assert factor.factor.isfinite().all() and error.max() < 2e-3
    along = torch.randn(40, 20, generator=generator).mul(min(1.0, 1e3 / size)).to(HALF)
    summed = factor.summed_with(along)
    exact = values.double().T @ along.double()
    assert (summed.double() - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_no_other(wrong):
    values, other = torch.ones(3, 2), torch.full((2, 4), 50.0, dtype=HALF)
    values[1, 0], values[2, 1] = wrong, 1e6
    factor = Factor.of(values, HALF)
    product = factor.factor @ factor.matching(other)
    assert torch.equal(product[0], torch.full((4,), 100.0, dtype=HALF)) and not product[1].isfinite().any()
    assert product[2].isinf().all()  # 5e7 fits nowhere


def test_factors_in_other_precisions_are_as_they_are():
    values = torch.randn(3, 2)
    assert Factor.of(values, torch.float32) == (values, None)
    assert Factor.of(torch.zeros(0, 2), HALF).factor.shape == (0, 2)


# a model


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_model_in_float16_stays_finite_where_its_output_does(implementation):
    model = adapted(mixture_implementation=implementation)
    for layer in model.base_model.layers_of("default").values():
        layer.trex_settings["default"] = layer.trex_settings["default"]._replace(token_scale=2.0**20)
        layer.trex_B["default"].data /= 2.0**16
    ids = prompts(4)
    batch = {"input_ids": ids, "labels": torch.where(torch.arange(9) < 5, -100, ids)}
    wanted = model(**batch).loss
    with torch.autocast("cpu", HALF):
        found = model(**batch).loss
    found.backward()
    assert abs(found.item() - wanted.item()) < 0.02 * abs(wanted.item())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_a_merge_in_float16_rounds_the_sum_alone():
    model = adapted(r_a=3, r_b=2)
    layers = list(model.base_model.layers_of("default").values())
    for layer in layers:  # of which float16 takes the tensors, but not the core times A
        layer.trex_settings["default"] = layer.trex_settings["default"]._replace(token_scale=2.0**24)
        layer.trex_A["default"].data *= 2.0**4
        layer.trex_B["default"].data /= 2.0**12
        layer.trex_gate["default"].data.fill_(-0.11)
    model.half()
    assert max(part.abs().max() for layer in layers for part in layer.static_factors("default")) > LARGEST
    wanted = []
    for layer in layers:
        down, up = layer.static_factors("default")
        wanted.append((layer.get_base_layer().weight.double() + up.double() @ down.double()).to(HALF))
    assert all(weight.isfinite().all() for weight in wanted)
    with pytest.warns(UserWarning, match="merged approximately"):
        model.merge_adapter(safe_merge=True)
    for layer, weight in zip(layers, wanted, strict=True):
        torch.testing.assert_close(layer.get_base_layer().weight, weight, rtol=0.002, atol=1e-3)
