"""The Triton kernels: against the reference, in Triton's interpreter and on a GPU where there is one; and compiled.

Triton decides when it is imported whether it interprets, so the kernels run in a process that is started for it.
"""

import importlib.util
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_trex.fast import gpu as kernels
from peft_trex.fast.base import Base
from peft_trex.fast.dispatch import add_mixture
from peft_trex.mixture import Experts, Settings, mix_features

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DEVICES = ["interpreter", *["cuda"] * torch.cuda.is_available()]
SCALES = {"token_scale": 32.0, "prior_scale": 4.0, "temperature": 100.0}
SIZES = {  # layout, r_a, r_b
    "4 x 8": ("grid", 4, 8),
    "1 x 1": ("grid", 1, 1),
    "3 x 5": ("grid", 3, 5),
    "16 x 16": ("grid", 16, 16),
    "8 pairs": ("paired", 8, 8),
    "5 pairs": ("paired", 5, 5),
    "256 pairs": ("paired", 256, 256),
}
PRIORS = ["none", "one row", "a row a prompt", "a row a token"]
NAMES = ("output", "u", "dh", "d_omega_logit", "d_gate_logit", "d_prior")


@pytest.fixture(scope="module", params=DEVICES)
def call(request):
    """Calls a function of the kernels on `call.device`: `call(kernels.mix, h, ...)`, with tensors of the CPU."""
    if request.param == "cuda":
        yield _named(lambda function, *args, **kw: _to("cpu", function(*_to("cuda", args), **kw)), "cuda")
        return
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(int).result()  # which starts the process
    with pool:
        yield _named(lambda *args, **kwargs: pool.submit(*args, **kwargs).result(), "interpreter")


def _named(function, device):
    function.device = device
    return function


def _to(device, value):
    if isinstance(value, tuple):
        parts = (_to(device, part) for part in value)
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    if isinstance(value, dict):
        return {name: _to(device, part) for name, part in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() != 2 or value.is_contiguous():
        return value.to(device)
    wider = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
    return wider.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def draw(size, tokens, prior="one row", dtype=torch.float32, seed=0, spread=1.0):
    """Arguments of a mix and its backward pass."""
    layout, r_a, r_b = size
    experts = r_a * r_b if layout == "grid" else r_a
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = {"none": 0, "one row": 1, "a row a prompt": 3, "a row a token": tokens}[prior]
    h = normal(tokens, r_a + experts)
    h[:, r_a:] *= spread
    return {
        "h": h.to(dtype),
        "du": normal(tokens, r_b).to(dtype),
        "prior": None if prior == "none" else normal(rows, experts).to(dtype),
        "omega_logit": (0.01 * normal(1)).to(dtype),
        "gate_logit": (0.01 * normal(1)).to(dtype),
    }


def arguments(size, case, scales=SCALES):
    """The kernels' positional arguments h, du, prior, experts and settings."""
    layout, r_a, r_b = size
    experts = Experts(torch.empty(r_a, 1), torch.empty(1, r_b), omega=case["omega_logit"], gate=case["gate_logit"])
    return case["h"], case["du"], case["prior"], experts, Settings(layout=layout, **scales)


def tokens_for(size, prior):
    """Some that fill more than two blocks, but not three, and can be split among three prompts."""
    layout, r_a, r_b = size
    block = kernels._shape(torch.empty(1, r_a + (r_a * r_b if layout == "grid" else r_a)), r_a, layout)["BLOCK"]
    return 3 * (2 * block // 3 + 1) if prior == "a row a prompt" else 2 * block + 1


def reference(h, du, prior, omega_logit, gate_logit, size, dtype, scales=SCALES):
    """What the kernels return, from the readable formula and autograd; softmax and mix are computed in `dtype`."""
    layout, r_a, _ = size
    leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in (h, omega_logit, gate_logit, prior)]
    h, omega_logit, gate_logit, prior = leaves
    omega = torch.sigmoid(scales["temperature"] * omega_logit.to(dtype))
    gate = torch.sigmoid(scales["temperature"] * gate_logit.to(dtype))
    G = omega * scales["token_scale"] * torch.softmax(h[:, r_a:], dim=-1, dtype=dtype)
    if prior is not None:
        known = prior.to(dtype).repeat_interleave(h.shape[0] // max(1, prior.shape[0]), dim=0)
        G = G + (1 - omega) * scales["prior_scale"] * known
    u = (gate * mix_features(h[:, :r_a], G, layout)).to(torch.float32 if h.dtype == torch.float16 else h.dtype)
    found = torch.autograd.grad(u, [leaf for leaf in leaves if leaf is not None], du.to(u.dtype))
    return u.detach(), u.detach(), *found, *[None] * (prior is None)


def run(call, size, case, scales=SCALES):
    """What the kernels return, by name."""
    h, du, *routing = arguments(size, case, scales)
    found = call(kernels.mix_backward, h, du, *routing, needs_prior=True)
    found = dict(zip(NAMES, (call(kernels.mix, h, *routing), *found), strict=True))
    if call.device != "interpreter" or h.dtype != torch.bfloat16:
        return found
    # The interpreter cuts off what GPUs round to bfloat16. So do the same in float32, and round that.
    whole = run(call, size, {**case, "h": h.float(), "du": du.float()}, scales)
    for name in NAMES[:3]:
        cut = (whole[name].view(torch.int32) & -(2**16)).view(torch.float32)
        torch.testing.assert_close(found[name], cut.bfloat16(), rtol=0, atol=1e-37)
        found[name] = whole[name].bfloat16()
    for name in NAMES[3:]:
        assert found[name] is whole[name] is None or torch.equal(found[name], whole[name])
    return found


def check(call, size, case, scales=SCALES):
    """Output and every gradient: the error is at most twice the reference's own at that precision."""
    found = run(call, size, case, scales)
    wide = {name: None if value is None else value.double() for name, value in case.items()}
    for name in ("omega_logit", "gate_logit"):  # one for each token: a sum is as exact as its terms are large
        wide[name] = wide[name].repeat(case["h"].shape[0], 1)
    exact = reference(**wide, size=size, dtype=torch.float64, scales=scales)
    plain = reference(**case, size=size, dtype=torch.float32, scales=scales)
    for name, exact_one, plain_one in zip(NAMES, exact, plain, strict=True):
        if exact_one is None:
            assert found[name] is None
            continue
        wide = case["h"].dtype == torch.float16 or name not in NAMES[:3]
        assert found[name].dtype == (torch.float32 if wide else case["h"].dtype)
        scale = exact_one.abs().max()
        if "logit" in name:
            scale, exact_one = exact_one.abs().sum(), exact_one.sum(0)
        assert found[name].shape == exact_one.shape
        error, allowed = ((value.double() - exact_one).abs().max() for value in (found[name], plain_one))
        assert error <= 2 * allowed + 4e-6 * scale, name


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_output_and_gradients_are_the_references(call, size, prior, dtype):
    check(call, size, draw(size, tokens_for(size, prior), prior, dtype))


@needs_triton
@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(["grid", "paired"]),
    r_a=st.integers(1, 16),
    r_b=st.integers(1, 16),
    prompts=st.integers(1, 4),
    length=st.integers(1, 12),
    each=st.sampled_from(["none", "prompt", "token"]),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.bfloat16])] * 2),
    scales=st.tuples(st.floats(0.5, 300), st.floats(0.5, 8), st.floats(1, 100)),
    seed=st.integers(0, 2**32),
)
def test_any_size(call, layout, r_a, r_b, prompts, length, each, dtypes, scales, seed):
    size = (layout, r_a, r_b if layout == "grid" else r_a)
    case = draw(size, prompts * length, "none" if each == "none" else "a row a token", dtypes[0], seed)
    if each == "prompt":
        case["prior"] = case["prior"][:prompts]
    for name in ("prior", "omega_logit", "gate_logit"):  # adapters in float32 beside a model in bfloat16
        case[name] = None if case[name] is None else case[name].to(dtypes[1])
    check(call, size, case, dict(zip(SCALES, scales, strict=True)))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logits", [(1.0, -1.0), (-1.0, 1.0), (1e4, 1e4), (-1e4, -1e4), (0.0, 0.0)])
@pytest.mark.parametrize("size", ["4 x 8", "5 pairs"])
def test_extreme_logits(call, size, logits, dtype):
    case = draw(SIZES[size], 7, "a row a token", dtype, spread=2e3)
    case["h"][0, -1], case["h"][1, -2] = 1e4, -1e4
    case["h"][2, SIZES[size][1] :] = 1e4  # all equal
    case["omega_logit"], case["gate_logit"] = (torch.tensor([logit], dtype=dtype) for logit in logits)
    check(call, SIZES[size], case)


@needs_triton
@pytest.mark.parametrize("size", ["4 x 8", "3 x 5", "5 pairs"])
def test_slices_and_views(call, size):
    case = draw(SIZES[size], 41, "a row a token")
    width = case["h"].shape[1]
    wider = torch.full((41, width + 7), float("nan"))
    wider[:, 3 : 3 + width] = case["h"]
    case["h"] = wider[:, 3 : 3 + width]
    case["du"] = case["du"].T.contiguous().T
    case["prior"] = case["prior"][:1].expand(41, -1)
    check(call, SIZES[size], case)
    check(call, SIZES[size], {**case, "h": case["h"].T.contiguous().T})


@needs_triton
@pytest.mark.parametrize("prior", ["none", "one row", "a row a token"])
@pytest.mark.parametrize("size", ["4 x 8", "5 pairs"])
def test_no_tokens(call, size, prior):
    h, du, *routing = arguments(SIZES[size], draw(SIZES[size], 0, prior))
    r_b = SIZES[size][2]
    assert call(kernels.mix, h, *routing).shape == (0, r_b)
    u, dh, *found = call(kernels.mix_backward, h, du, *routing, needs_prior=True)
    assert u.shape == (0, r_b) and dh.shape == h.shape
    wanted = [torch.zeros(1), torch.zeros(1), None if prior == "none" else torch.zeros(routing[0].shape)]
    for one, other in zip(found, wanted, strict=True):
        assert one is None if other is None else torch.equal(one, other)


@needs_triton
@pytest.mark.parametrize("prior", PRIORS)
def test_the_priors_gradient_is_left_out_unless_asked_for(call, prior):
    h, du, *routing = arguments(SIZES["4 x 8"], draw(SIZES["4 x 8"], 9, prior))
    *found, none = call(kernels.mix_backward, h, du, *routing, needs_prior=False)
    *wanted, _ = call(kernels.mix_backward, h, du, *routing, needs_prior=True)
    assert none is None
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def with_base(leaves, mix_settings):
    """The fast path on an output `base`, or on a frozen layer with the weight `base.T`, which is computed along."""
    x, base = leaves["x"], Base(leaves["x"], None, leaves["base"])
    if leaves["base"].dim() == 2:
        layer = torch.nn.Linear(*leaves["base"].shape, bias=False).requires_grad_(False)
        layer.weight.data = leaves.pop("base").detach().T.contiguous()
        base = Base(x, layer)
    names = ("A", "B", "router", "router_down", "omega_logit", "gate_logit")
    experts = Experts(*(leaves.get(name) for name in names))
    return add_mixture(base, x, experts, leaves.get("prior"), mix_settings)


def fast_path(tensors, outgoing, autocast, mix_settings):
    """Output and gradients of the whole fast path with the kernels in it, and how often they were called."""
    calls = []
    originals = {name: getattr(kernels, name) for name in ("mix", "mix_backward", "available")}
    for name in ("mix", "mix_backward"):
        setattr(kernels, name, lambda *args, name=name, **kw: calls.append(name) or originals[name](*args, **kw))
    kernels.available = lambda x: x.dtype in kernels.DTYPES
    try:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        with torch.autocast(outgoing.device.type, torch.float16, enabled=autocast):
            output = with_base(leaves, mix_settings)
        found = torch.autograd.grad(output, list(leaves.values()), outgoing.to(output.dtype))
    finally:
        for name, original in originals.items():
            setattr(kernels, name, original)
    return output.detach(), *found, calls


@needs_triton
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("prior", ["none", "one row", "a row a prompt", "a row a token"])
@pytest.mark.parametrize(("size", "top_k"), [("4 x 8", None), ("5 pairs", None), ("4 x 8", 3)])
@pytest.mark.parametrize("base", ["output", "layer"])
def test_the_fast_path_with_them_is_the_one_without(call, base, size, top_k, prior, rank, autocast):
    layout, r_a, r_b = SIZES[size]
    experts = r_a * r_b if layout == "grid" else r_a
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = {"one row": (1, experts), "a row a prompt": (3, experts), "a row a token": (3, 7, experts)}
    given = normal(3, 7, 20)
    given = given if base == "output" else given.flatten()[:320].view(16, 20) / 4
    tensors = {"base": given, "x": normal(3, 7, 16), "A": normal(r_a, 16) / 4, "B": normal(20, r_b)}
    tensors |= {
        "router": normal(experts, rank or 16) / 4,
        "omega_logit": normal(1) / 100,
        "gate_logit": normal(1) / 100,
    }
    tensors |= {"router_down": normal(rank, 16)} if rank else {}
    tensors |= {} if prior == "none" else {"prior": normal(*rows[prior])}
    outgoing = normal(3, 7, 20)
    mix_settings = Settings(layout=layout, top_k=top_k, **SCALES)
    *found, calls = call(fast_path, tensors, outgoing, autocast, mix_settings)
    assert calls == ["mix", "mix_backward"]
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    output = with_base(leaves, mix_settings)
    wanted = output, *torch.autograd.grad(output, list(leaves.values()), outgoing)
    for name, one, other in zip(("output", *leaves), found, wanted, strict=True):
        # the logits' gradients are what is left of large sums
        tolerance = (0.1 if "logit" in name else 0.02) if autocast else 1e-5
        size_of_it = max(1, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * size_of_it, check_dtype=False, msg=name)


@needs_triton
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize(("token_scale", "prior_scale"), [(32.0, 4.0), (512.0, 4.0), (32.0, 3e3)])
@pytest.mark.parametrize("base", ["output", "layer"])
def test_features_beyond_float16_do_not_overflow(call, base, token_scale, prior_scale, rank, autocast):
    """The features a, as LoRA's, fit in float16, and so do the output and x's gradient; what is between does not."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "base": normal(*((16, 20) if base == "layer" else (3, 7, 20))) * 1e-3,
        "x": normal(3, 7, 16) * 5e3,
        "A": normal(4, 16) / 3,
        "B": normal(20, 8) * (1e-3 if prior_scale < 100 else 1e-4),
        "router": normal(32, rank or 16) * 1e-4,
        "prior": normal(3, 32).clamp(-1, 1),
        "omega_logit": torch.tensor([0.001]),
        "gate_logit": torch.tensor([0.02]),
    }
    tensors |= {"router_down": normal(rank, 16) / 8} if rank else {}
    assert (tensors["x"] @ tensors["A"].T).abs().max() < 6e4
    tensors = {name: tensor if autocast else tensor.half() for name, tensor in tensors.items()}
    mix_settings, outgoing = Settings(token_scale, prior_scale, 100.0), normal(3, 7, 20)

    def exact(outgoing):
        leaves = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
        output = with_base(leaves, mix_settings)
        return output, *torch.autograd.grad(output, list(leaves.values()), outgoing.double())

    names = ["output", *(name for name in tensors if not (name == "base" and base == "layer"))]
    sizes = {name: tensor.abs().max() for name, tensor in zip(names, exact(outgoing), strict=True)}
    largest, limit = sizes["x"], torch.finfo(torch.float16).max
    assert sizes["output"] < limit
    outgoing = (outgoing * min(1.0, 3e4 / largest.item())).half()
    *found, _ = call(fast_path, tensors, outgoing, autocast, mix_settings)
    for name, one, other in zip(names, found, exact(outgoing), strict=True):
        if name in ("output", "x") or other.abs().max() < limit / 10:
            assert one.isfinite().all(), name
            error, smallest = (one.double() - other).norm(), 2.0**-24 * other.numel() ** 0.5
            assert error <= 0.02 * other.norm() + smallest or "logit" in name, name


def mix_far_apart(h, du, *routing, stride):
    """The mix and its gradient when h's rows lie `stride` elements apart. What is between them is never touched."""
    rows = h.new_empty((h.shape[0] - 1) * stride + h.shape[1]).as_strided(h.shape, (stride, 1))
    rows.copy_(h)
    found = kernels.mix_backward(rows, du, *routing, needs_prior=False)
    return kernels.mix(rows, *routing), found[1]


@needs_triton
def test_offsets_beyond_32_bits(call):  # comes after the others, for a wrong address ends the process
    case = arguments(SIZES["4 x 8"], draw(SIZES["4 x 8"], 3, dtype=torch.float16))
    near, far = (call(mix_far_apart, *case, stride=stride) for stride in (36, 2**30))
    torch.testing.assert_close(near, far)


def compiled(backward, size, dtype, prior, target):
    """The kernel's binary for a GPU that need not be there: its length, and the bytes it spills of its registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    layout, r_a, r_b = size
    kernel = kernels._mix
    constants = kernels._shape(torch.empty(1, r_a + (r_a * r_b if layout == "grid" else r_a)), r_a, layout)
    constants |= {} if prior else {"prior": None, "d_prior": None}
    constants |= {} if backward else dict.fromkeys(["du", "dh", "d_logits", "d_prior"])
    types = {name: f"*{dtype}" for name in ("h", "du", "u", "dh")}
    types |= dict.fromkeys(["prior", "d_prior", "omega_logit", "gate_logit", "d_logits"], "*fp32")
    types |= dict.fromkeys(["tokens", "row", "tokens_per_prior"], "i32")
    types |= dict.fromkeys(["token_scale", "prior_scale", "temperature"], "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs={name: value for name, value in constants.items() if name in kernel.arg_names},
        attrs={(k,): [["tt.divisibility", 16]] for k, name in enumerate(kernel.arg_names) if types[name][0] == "*"},
    )
    options = {"num_warps": kernels.WARPS, "enable_fp_fusion": True}
    try:
        done = triton.compile(source, target=GPUTarget(*target), options=options)
    except Exception as error:
        if "ROCm linker" in str(error):  # releases before 3.5 bring none
            pytest.skip(str(error))
        raise
    if target[0] == "hip":
        spills = re.findall(r"_spill_count:\s+(\d+)", done.asm["amdgcn"])
        return len(done.asm["hsaco"]), spills
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(done.asm["cubin"]), re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)


TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@needs_triton
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("target", "dtype", "size", "prior"),
    [
        *[(target, dtype, "4 x 8", True) for target in ("sm_80", "sm_90") for dtype in ("fp32", "fp16", "bf16")],
        ("gfx942", "bf16", "4 x 8", True),
        *[("sm_90", "bf16", size, False) for size in ("4 x 8", "3 x 5", "16 x 16", "8 pairs", "256 pairs")],
    ],
)
def test_compiles_for_gpus_without_spilling(target, backward, size, dtype, prior, monkeypatch, tmp_path):
    if not hasattr(kernels._mix, "cache_key"):
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    length, spilled = compiled(backward, SIZES[size], dtype, prior, TARGETS[target])
    assert length > 1000
    assert [int(number) for number in spilled] == [0, 0]


def test_what_the_kernels_are_available_for(monkeypatch):
    monkeypatch.setattr(kernels, "triton", SimpleNamespace())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert kernels.available(SimpleNamespace(is_cuda=True, dtype=dtype))
        assert not kernels.available(torch.empty(1, dtype=dtype))
    assert not kernels.available(SimpleNamespace(is_cuda=True, dtype=torch.float64))


def test_the_module_imports_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("peft_trex.fast.gpu_alone", kernels.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert not alone.available(SimpleNamespace(is_cuda=True, dtype=torch.float32))
