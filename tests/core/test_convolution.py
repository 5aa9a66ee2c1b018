"""Convolutions: the mixture of what lies under the kernel; merged, calibrated, reported, exported or refused."""

import pytest
import torch
from conftest import some_embeddings
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm
from torch.nn.utils.parametrizations import weight_norm as parametrized_norm
from transformers.modeling_outputs import ImageClassifierOutput

from peft_trex import TRexConfig, calibrate_trex_merge, initialize_trex_prior, routing_report, save_trex_as_lora
from peft_trex.convolution import Convolution
from peft_trex.mixture import rank_one_mixture
from peft_trex.router_losses import balance_loss

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SHAPES = {1: (11,), 2: (7, 6), 3: (5, 4, 6)}
KERNELS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "bias": False},
    {"kernel_size": 2, "dilation": 2, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 2, "dilation": 3, "padding": 1, "padding_mode": "circular"},
]
EXTERNAL = {"prior_encoder": "external", "prior_dim": 5}
FORMS = [
    {},
    {"router_rank": 2},
    {"router_top_k": 2},
    {"use_router": False, "shared_core": True},
    {"expert_layout": "paired", "r_a": 3},
    {"use_prior": False, "prior_encoder": "input_embeddings", "prior_dim": None},
]


class Net(nn.Module):
    """Two convolutions and a mean over the places."""

    def __init__(self, axes=2, **kernel):
        super().__init__()
        torch.manual_seed(0)
        self.conv = KINDS[axes](3, 4, **kernel)
        self.last = KINDS[axes](4, 2, 1)

    def forward(self, pixel_values, labels=None):
        logits = self.last(self.conv(pixel_values).tanh()).flatten(2).mean(-1)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def make(axes=2, kernel=KERNELS[1], **form):
    """A net in float64 whose adapter is off its start, and has a fitted prior where it has any."""
    settings = {"r_a": 2, "r_b": 3, "num_clusters": 4, "target_modules": ["conv", "last"], **EXTERNAL, **form}
    model = get_peft_model(Net(axes, **kernel), TRexConfig(**settings)).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "trex_" in name:
            scale = 0.01 if "omega" in name or "gate" in name else 0.5
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    if settings.get("use_prior", True):
        initialize_trex_prior(model, embeddings=some_embeddings(40), progress=False)
    return model


def batch_of(model, rows=3, seed=2):
    axes = model.base_model.model.conv.get_base_layer().weight.dim() - 2
    x = torch.randn(rows, 3, *SHAPES[axes], generator=torch.Generator().manual_seed(seed)).double()
    if not model.peft_config["default"].use_prior:
        return {"pixel_values": x}
    return {"pixel_values": x, "semantic_embeds": some_embeddings(rows + seed)[-rows:]}


def patches(x, layer):
    """What lies under the kernel at each place of the output, (B, ..., C_in times the kernel's size)."""
    sides = [side for size in reversed(layer.padding) for side in (size, size)]
    x = F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    count = len(layer.kernel_size)
    for axis in range(count):
        step = layer.dilation[axis]
        x = x.unfold(2 + axis, (layer.kernel_size[axis] - 1) * step + 1, layer.stride[axis])[..., ::step]
    return x.movedim(1, count + 1).flatten(count + 1)


def formula(layer, x, scores):
    """The layer's output by the reference, on patches."""
    experts, settings, base = layer.experts_of("default"), layer.trex_settings["default"], layer.base_layer
    prior = layer._prior("default", scores)
    y = rank_one_mixture(
        patches(x, base),
        experts.A,
        experts.B,
        experts.router,
        prior,
        experts.omega,
        experts.gate,
        router_down=experts.router_down,
        token_scale=settings.token_scale,
        prior_scale=settings.prior_scale,
        layout=settings.layout,
        top_k=settings.top_k,
    )
    return base(x) + y.movedim(-1, 1)


def scores_of(model, batch):
    if "semantic_embeds" not in batch:
        return None
    return model.base_model.trex_prior["default"].score(batch["semantic_embeds"]).double()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_it_is_the_mixture_on_patches_with_every_gradient(axes, form):
    for kernel in KERNELS if form == {} else KERNELS[2:3]:
        if axes == 3 and kernel.get("padding_mode") == "reflect":
            kernel = {**kernel, "padding_mode": "replicate"}
        model = make(axes, kernel, **form)
        net, batch = model.base_model.model, batch_of(model)
        assert type(net.conv) is Convolution and repr(net.conv).startswith("trex.Convolution(")
        scores = scores_of(model, batch)
        assert scores is None or scores.std(0).max() > 0.01
        parameters = [one for name, one in model.named_parameters() if "trex_" in name]
        found = model(**batch).logits
        gradients = torch.autograd.grad(found.square().sum(), parameters)
        hidden = formula(net.conv, batch["pixel_values"], scores).tanh()
        expected = formula(net.last, hidden, scores).flatten(2).mean(-1)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), parameters))
        assert not torch.allclose(found, net.last.base_layer(net.conv.base_layer(batch["pixel_values"]).tanh()).mean())


@pytest.mark.parametrize(("axes", "kernel"), [(1, KERNELS[1]), (2, KERNELS[3]), (3, KERNELS[2])])
def test_what_is_static_merges_exactly_and_unmerges(axes, kernel):
    """Without a router and at a prior of zero the core is all there is."""
    if axes == 3:
        kernel = {**kernel, "padding": 1}
    model = make(axes, kernel, use_router=False, shared_core=True)
    batch = batch_of(model)
    batch["semantic_embeds"] = torch.zeros(3, 5)
    model.base_model.trex_prior["default"].centroids.zero_()
    model.base_model.trex_prior["default"].mean_scores.zero_()
    expected = model(**batch).logits
    net = model.base_model.model
    before = net.conv.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="approximately"):
        model.merge_adapter()
    assert not torch.allclose(net.conv.base_layer.weight, before)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(net.conv.base_layer.weight, before)
    with pytest.warns(UserWarning, match="approximately"):
        merged = model.merge_and_unload()
    assert type(merged.conv) is KINDS[axes]
    torch.testing.assert_close(merged(batch["pixel_values"]).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", [KERNELS[0], {"kernel_size": 3, "padding": 1, "stride": 2}], ids=str)
def test_calibrated_it_leaves_as_lora(kernel, tmp_path):
    model = make(2, kernel, use_router=False, shared_core=True)
    # All prompts are alike, so that the adapter is static, and the calibration can find it.
    data = [batch_of(model, rows=4, seed=seed) for seed in range(3)]
    embeds = some_embeddings(1).expand(4, -1)
    data = [{**batch, "semantic_embeds": embeds} for batch in data]
    report = calibrate_trex_merge(model, data, progress=False)
    assert report.error < 1e-6 < report.mean_routing_error
    expected = model(**data[0]).logits
    save_trex_as_lora(model, tmp_path / "lora", per_cluster=False)
    lora = PeftModel.from_pretrained(Net(2, **kernel).double(), tmp_path / "lora", autocast_adapter_dtype=False)
    x = data[0]["pixel_values"]
    torch.testing.assert_close(lora.eval()(pixel_values=x).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, Net(2, **kernel).double()(x).logits, atol=1e-2)


def test_what_pefts_lora_does_not_know_is_not_exported(tmp_path):
    for kernel in (KERNELS[3], {"kernel_size": 2, "dilation": 2}):
        with pytest.raises(ValueError, match="knows no dilation and pads by zeros"), pytest.warns(UserWarning):
            save_trex_as_lora(make(2, kernel), tmp_path / "lora", per_cluster=False)
    assert not (tmp_path / "lora").exists()
    assert not make().base_model.supports_lora_conversion()


def test_the_report_counts_places_as_tokens():
    model = make(2, KERNELS[2])
    batch = batch_of(model)
    seen = {}
    layer = model.base_model.model.conv
    layer.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    report = routing_report(model, [batch], progress=False)
    figures = report.layers["conv"]
    base = layer.base_layer(seen["x"])
    assert figures.tokens == base[:, 0].numel() == 3 * 3 * 2
    energy = (seen["y"] - base).square().sum() / base.square().sum()
    assert figures.energy == pytest.approx(float(energy), rel=1e-4)


def test_router_losses_are_those_of_the_patches():
    model = make(2, KERNELS[2], balance_loss_coef=0.5, target_modules=["conv"]).train()
    batch = {**batch_of(model), "labels": torch.tensor([0, 1, 1])}
    output, net = model(**batch), model.base_model.model
    tokens = patches(batch["pixel_values"], net.conv.base_layer).flatten(0, -2)
    added = balance_loss(
        tokens @ net.conv.trex_router["default"].T, torch.full((len(tokens),), 1 / len(tokens)).double()
    )
    loss = F.cross_entropy(output.logits, batch["labels"])
    torch.testing.assert_close(output.loss, loss + 0.5 * added)


def test_saved_and_loaded(tmp_path):
    model = make(2, KERNELS[1])
    batch = batch_of(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(2, **KERNELS[1]).double(), tmp_path, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)


class OwnForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.flip(-1), bias)


class Reader(nn.Module):
    """It hands the weight of a convolution to a function, as Mamba's blocks do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 2)

    def forward(self, x):
        return F.conv1d(x, self.conv.weight)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Conv2d(4, 4, 1, groups=2), "groups=2"),
        (OwnForward(3, 4, 2), "forward of its own"),
        (weight_norm(nn.Conv1d(3, 4, 2)), "weight_norm"),
        (parametrized_norm(nn.Conv1d(3, 4, 2)), "weight_norm"),
        (nn.ConvTranspose1d(3, 4, 2), "T-REX adapts torch.nn.Linear, Conv1d, Conv2d and Conv3d"),
        (nn.Embedding(5, 3), "a column for each of the vocabulary.*modules_to_save"),
        (nn.MultiheadAttention(4, 2), "hands the weights of all its projections to one function"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_is_refused_by_name(module, words):
    base = nn.Sequential()
    base.add_module("odd", module)
    with pytest.raises(ValueError, match=f"The target module odd is a .*{words}"):
        get_peft_model(base, TRexConfig(target_modules=["odd"], use_prior=False))


def test_a_convolution_whose_weight_is_read_is_refused_and_all_linear_leaves_it():
    with pytest.raises(ValueError, match=r"target module 0.conv: its weight is read by the Reader"):
        get_peft_model(nn.Sequential(Reader()), TRexConfig(target_modules=["conv"], use_prior=False))
    base = nn.Sequential(Reader(), nn.Linear(3, 3))
    config = TRexConfig(target_modules="all-linear", use_prior=False)
    assert dict(get_peft_model(base, config).base_model.trex_layers()).keys() == {"1"} and not config.exclude_modules


def test_an_input_without_rows_is_refused():
    model = make(2, use_prior=False, **{"prior_encoder": "input_embeddings", "prior_dim": None})
    with pytest.raises(ValueError, match=r"Conv2d got an input of shape \(3, 7, 6\); expected a batch"):
        model(pixel_values=batch_of(model)["pixel_values"][0])
