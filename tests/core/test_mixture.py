"""The pure functions against the recorded runs of the authors' layer, and against their own definition."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_trex.mixture import (
    Experts,
    Settings,
    keep_strongest,
    mean_core,
    mix_features,
    num_experts,
    rank_one_mixture,
    router_logits,
    weigh_experts,
)

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "index.json").read_text())


def _loop_mixture(x, A, B, router, prior, omega_logit, gate_logit, token_scale, prior_scale, temperature, layout):
    """The method token by token and expert by expert, in float64: slow, and hard to get wrong."""
    r_a, r_b = A.shape[0], B.shape[1]
    omega, gate = torch.sigmoid(temperature * omega_logit), torch.sigmoid(temperature * gate_logit)
    y = torch.zeros(*x.shape[:2], B.shape[0], dtype=x.dtype)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            G = omega * token_scale * torch.softmax(router @ x[row, t], 0) + (1 - omega) * prior_scale * prior[row]
            pairs = (
                [(i, j) for i in range(r_a) for j in range(r_b)] if layout == "grid" else [(i, i) for i in range(r_a)]
            )
            for e, (i, j) in enumerate(pairs):
                y[row, t] += gate[0] * G[e] * (A[i] @ x[row, t]) * B[:, j]
    return y


def _random_case(layout, r_a, r_b, rows=2, tokens=3, d_in=5, d_out=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    experts = num_experts(r_a, r_b, layout)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return {
        "x": draw(rows, tokens, d_in),
        "A": draw(r_a, d_in),
        "B": draw(d_out, r_b),
        "router": draw(experts, d_in),
        "prior": draw(rows, experts),
        "omega_logit": draw(1, scale=0.01),
        "gate_logit": draw(1, scale=0.01),
    }


def _assert_same(found, recorded):
    """Equal to 1e-5 of the tensor's largest element: gradients here reach 100 and more, and float32 holds 7 digits."""
    torch.testing.assert_close(found, recorded, rtol=0, atol=1e-5 * max(1.0, recorded.abs().max().item()))


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_runs_of_the_authors_layer(case):
    data = load_file(DATA / f"{case['name']}.safetensors")
    names = {
        "A": "lora_A.default.weight",
        "B": "lora_B.default.weight",
        "router": "router.weight",
        "mapper": "rank1_flex_mapper.weight",
        "omega": "omg.weight",
        "gate": "binary_main_gate_weight.weight",
    }
    params = {key: data[f"param.{name}"].requires_grad_() for key, name in names.items() if f"param.{name}" in data}
    x = data["x"].requires_grad_()
    prior = None
    if case["ablation"] != "intuition":
        prior = data["score"] @ params["mapper"].T if case["mapping"] else data["score"]
    router = params["router"] if case["ablation"] != "rank1" else None
    y = torch.nn.functional.linear(x, data["param.weight"]) + rank_one_mixture(
        x,
        params["A"],
        params["B"],
        router,
        prior,
        params["omega"].reshape(1),
        params["gate"].reshape(1),
        token_scale=32.0,
        layout="grid" if case["mode"] == "rank1_flex" else "paired",
    )
    _assert_same(y, data["y"])
    y.backward(data["grad_y"])
    _assert_same(x.grad, data["grad_x"])
    assert {"A", "B", "omega", "gate"} <= set(params)
    for key, parameter in params.items():
        if key != "router" or router is not None:
            _assert_same(parameter.grad, data[f"grad.{names[key]}"])


@pytest.mark.parametrize(("layout", "r_a", "r_b"), [("grid", 2, 3), ("grid", 1, 1), ("grid", 4, 1), ("paired", 3, 3)])
def test_equals_the_loop_over_experts(layout, r_a, r_b):
    case = _random_case(layout, r_a, r_b)
    settings = {"token_scale": 1.7, "prior_scale": 3.1, "temperature": 90.0, "layout": layout}
    expected = _loop_mixture(**case, **settings)
    torch.testing.assert_close(rank_one_mixture(**case, **settings), expected)


@pytest.mark.parametrize("layout", ["grid", "paired"])
def test_gradients_are_those_of_the_formula(layout):
    case = _random_case(layout, 2, 2)
    tensors = [tensor.requires_grad_() for tensor in case.values()]

    def mixture(x, A, B, router, prior, omega_logit, gate_logit):
        return rank_one_mixture(
            x, A, B, router, prior, omega_logit, gate_logit, token_scale=2.0, temperature=5.0, layout=layout
        )

    assert torch.autograd.gradcheck(mixture, tensors)


@pytest.mark.parametrize("layout", ["grid", "paired"])
def test_a_reduced_router_is_the_product_of_its_factors(layout):
    case = _random_case(layout, 2, 2)
    up, down = torch.randn(4 if layout == "grid" else 2, 3).double(), torch.randn(3, 5).double()
    settings = {"token_scale": 2.0, "temperature": 5.0, "layout": layout}
    factored = rank_one_mixture(**{**case, "router": up}, router_down=down, **settings)
    torch.testing.assert_close(factored, rank_one_mixture(**{**case, "router": up @ down}, **settings))

    def mixture(x, up, down):
        return rank_one_mixture(**{**case, "x": x, "router": up}, router_down=down, **settings)

    assert torch.autograd.gradcheck(mixture, [tensor.requires_grad_() for tensor in (case["x"], up, down)])


@pytest.mark.parametrize("layout", ["grid", "paired"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_top_k_leaves_the_router_s_part_to_the_strongest(layout, top_k):
    """By hand, token by token; and the gradients are those of this function, not of a straight-through estimate."""
    case = _random_case(layout, *((2, 2) if layout == "grid" else (4, 4)))
    settings = {"token_scale": 1.7, "prior_scale": 3.1, "temperature": 5.0}
    logits = router_logits(case["x"], case["router"])
    found = weigh_experts(case["x"], logits, case["prior"], case["omega_logit"], Settings(top_k=top_k, **settings))
    omega = torch.sigmoid(5.0 * case["omega_logit"])
    for row, token in itertools.product(range(case["x"].shape[0]), range(case["x"].shape[1])):
        logits = case["router"] @ case["x"][row, token]
        chosen = sorted(range(4), key=lambda expert: -logits[expert])[:top_k]
        known = (1 - omega) * 3.1 * case["prior"][row]
        expected = known.clone()
        for expert in chosen:
            share = logits[expert].exp() / sum(logits[other].exp() for other in chosen)
            expected[expert] += (omega * 1.7 * share).item()
        torch.testing.assert_close(found[row, token], expected)
    tensors = [tensor.requires_grad_() for tensor in case.values()]

    def mixture(x, A, B, router, prior, omega_logit, gate_logit):
        return rank_one_mixture(
            x, A, B, router, prior, omega_logit, gate_logit, layout=layout, top_k=top_k, **settings
        )

    assert torch.autograd.gradcheck(mixture, tensors)


def test_top_k_of_all_experts_is_the_whole_mixture():
    case = _random_case("grid", 2, 3)
    assert torch.equal(rank_one_mixture(**case, token_scale=6.0, top_k=6), rank_one_mixture(**case, token_scale=6.0))


@pytest.mark.parametrize("dim", [0, 1])
def test_of_equal_logits_the_first_are_kept(dim):
    logits = torch.tensor([[0.0, 2.0, 0.0, 2.0, 2.0, -1.0], [0.0] * 6])
    gone = -torch.inf
    expected = torch.tensor([[gone, 2.0, gone, 2.0, gone, gone], [0.0, 0.0, *[gone] * 4]])
    found = keep_strongest(logits if dim else logits.T.contiguous(), 2, dim)
    assert torch.equal(found if dim else found.T, expected)


@pytest.mark.parametrize("top_k", [0, 7])
def test_top_k_beyond_the_experts_is_refused(top_k):
    with pytest.raises(ValueError, match=rf"top_k={top_k} .*number of experts, 6"):
        rank_one_mixture(**_random_case("grid", 2, 3), token_scale=6.0, top_k=top_k)


def test_token_prior_is_the_row_prior_repeated():
    case = _random_case("grid", 2, 3)
    by_row = rank_one_mixture(**case, token_scale=6.0)
    case["prior"] = case["prior"][:, None, :].expand(-1, 3, -1)
    torch.testing.assert_close(rank_one_mixture(**case, token_scale=6.0), by_row)


@pytest.mark.parametrize("shape", [(4, 5), (4, 1, 5), (4, 2, 3, 5), (0, 3, 5)])
def test_any_leading_axes(shape):
    case = _random_case("grid", 2, 3)
    case["x"] = torch.randn(shape, dtype=torch.float64)
    case["prior"] = torch.randn(shape[0], 6, dtype=torch.float64)
    y = rank_one_mixture(**case, token_scale=6.0)
    assert y.shape == (*shape[:-1], 7)
    for row in range(shape[0]):
        single = {**case, "x": case["x"][row : row + 1], "prior": case["prior"][row : row + 1]}
        torch.testing.assert_close(rank_one_mixture(**single, token_scale=6.0)[0], y[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_routes_in_float32(dtype):
    case = _random_case("grid", 4, 8, d_in=64, d_out=48, tokens=33, seed=3)
    exact = rank_one_mixture(**case, token_scale=32.0)
    low = {key: tensor.to(dtype) for key, tensor in case.items()}
    y = rank_one_mixture(**low, token_scale=32.0)
    assert y.dtype == dtype
    rounded = {key: tensor.double() for key, tensor in low.items()}
    floor = (rank_one_mixture(**rounded, token_scale=32.0).to(dtype).double() - exact).norm()
    assert (y.double() - exact).norm() <= 2 * floor
    weights = weigh_experts(low["x"], router_logits(low["x"], low["router"]), None, None, Settings(token_scale=1.0))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 33), rtol=0, atol=1e-6)  # a softmax in dtype would not


def _experts(case):
    return Experts(case["A"], case["B"], case["router"], omega=case["omega_logit"], gate=case["gate_logit"])


def _static_output(case, core):
    """What a static core makes of the case's input."""
    gate = torch.sigmoid(100 * case["gate_logit"])
    return case["x"] @ (gate * case["B"] @ core @ case["A"]).T


@pytest.mark.parametrize("layout", ["grid", "paired"])
def test_mean_core_is_exact_without_a_router(layout):
    case = _random_case(layout, 3, 3, rows=1)
    case["router"] = None
    settings = {"token_scale": 9.0, "prior_scale": 4.0, "temperature": 100.0, "layout": layout}
    core = mean_core(_experts(case), case["prior"][0], Settings(**settings))
    torch.testing.assert_close(_static_output(case, core), rank_one_mixture(**case, **settings))


def test_mean_core_takes_a_uniform_router():
    case = _random_case("grid", 2, 3, rows=1)
    case["router"] = torch.zeros_like(case["router"])
    core = mean_core(_experts(case), case["prior"][0], Settings(token_scale=6.0))
    torch.testing.assert_close(_static_output(case, core), rank_one_mixture(**case, token_scale=6.0))


@pytest.mark.parametrize("layout", ["grid", "paired"])
def test_mixed_features_are_what_B_is_applied_to(layout):
    case = _random_case(layout, 3, 3)
    logits = router_logits(case["x"], case["router"])
    G = weigh_experts(case["x"], logits, case["prior"], case["omega_logit"], Settings(token_scale=9.0))
    m = mix_features(case["x"] @ case["A"].T, G, layout)
    gate = torch.sigmoid(100 * case["gate_logit"])
    torch.testing.assert_close(gate * m @ case["B"].T, rank_one_mixture(**case, token_scale=9.0, layout=layout))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(2, 4)}, "D_in = 5"),
        ({"B": torch.zeros(7)}, r"\(D_out, r_b\)"),
        ({"router": torch.zeros(5, 5)}, r"\(6, 5\)"),
        ({"router_down": torch.zeros(3, 4)}, r"\(Q, D_in\) with D_in = 5"),
        ({"router_down": torch.zeros(3, 5), "router": None}, "a router"),
        ({"router_down": torch.zeros(3, 5)}, r"\(E, Q\) = \(6, 3\)"),
        ({"prior": torch.zeros(2, 5)}, "E = 6"),
        ({"prior": torch.zeros(3, 6)}, "leading axes"),
        ({"prior": torch.zeros(2, 4, 6)}, "leading axes"),
        ({"prior": torch.zeros(6)}, "E = 6"),
        ({"layout": "diagonal"}, "'grid' or 'paired'"),
        ({"layout": "paired"}, "as many rows in A"),
        ({"router": None, "prior": None}, "neither"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    case = {**_random_case("grid", 2, 3), "token_scale": 6.0, **change}
    with pytest.raises(ValueError, match=message):
        rank_one_mixture(**case)
