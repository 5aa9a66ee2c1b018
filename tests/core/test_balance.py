"""The router losses: what they are, that they reach the loss and every gradient once, and what they are good for."""

import copy
import warnings

import pytest
import torch
from conftest import adapted, answered, make_gpt2, make_llama, make_t5, pad_to, prompts, randomize
from peft import PeftModel
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from peft_trex import TRexConfig, TRexLayer
from peft_trex.mixture import keep_strongest
from peft_trex.prior.inputs import Inputs
from peft_trex.router_losses import LOSS, RouterLosses, balance_loss, z_loss

COEFFICIENTS = {"balance_loss_coef": 0.3, "router_z_loss_coef": 0.02}


def _even(logits):
    return logits.new_full((len(logits),), 1 / len(logits))


def test_the_balance_loss_is_one_if_all_get_the_same_and_E_if_one_gets_all():
    assert balance_loss(torch.zeros(5, 6), torch.full((5,), 0.2)).item() == pytest.approx(1)
    assert balance_loss(100 * torch.eye(6)[[2] * 5], torch.full((5,), 0.2)).item() == pytest.approx(6)
    # each token takes one expert, all together take all: load is even though no token's weights are
    assert balance_loss(100 * torch.eye(6), torch.full((6,), 1 / 6), top_k=1).item() == pytest.approx(1)


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_the_balance_loss_by_hand(top_k):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    counts = torch.rand(7, generator=generator, dtype=torch.float64)
    counts /= counts.sum()
    load, mean = torch.zeros(4).double(), torch.zeros(4).double()
    for token, count in zip(logits, counts, strict=True):
        mean = mean + count * token.exp() / token.exp().sum()
        chosen = token.topk(top_k or 4).indices
        load[chosen] += (count * token[chosen].exp() / token[chosen].exp().sum()).detach()
    found, expected = balance_loss(logits, counts, top_k), 4 * (load * mean).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (found, expected)))
    expected = sum(count * torch.log(token.exp().sum()) ** 2 for token, count in zip(logits, counts, strict=True))
    torch.testing.assert_close(z_loss(logits, counts), expected)


def _train(model, batch):
    """Loss and gradients of a training forward."""
    model.train()
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _by_hand(model, batch, top_k=None, name="default", masked=True):
    """The losses' means over the layers, from the layers' inputs, seen from outside."""
    seen = []
    layers = [module for module in model.modules() if isinstance(module, TRexLayer) and name in module.trex_A]
    handles = [layer.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0]))) for layer in layers]
    model.train()(**batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(layers)
    mask = batch.get("attention_mask") if masked else None
    balance, z = [], []
    for layer, x in seen:
        tokens = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
        router = layer.trex_router[name]
        if name in layer.trex_router_down:
            router = router @ layer.trex_router_down[name]
        logits = tokens @ router.T
        p = logits.softmax(-1).mean(0)
        load = keep_strongest(logits, top_k).softmax(-1).mean(0) if top_k else p
        balance.append(len(p) * (load * p).sum().item())
        z.append(logits.logsumexp(-1).square().mean().item())
    return sum(balance) / len(balance), sum(z) / len(z)


def _padded(side):
    rows = [pad_to(ids[:length], 9, side) for ids, length in zip(prompts(3, seed=5), (9, 6, 4), strict=True)]
    ids, mask = (torch.stack(parts) for parts in zip(*rows, strict=True))
    answer = (mask.cumsum(1) > 2) & mask.bool()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~answer, -100)}


BATCHES = {"even": answered(4), "left": _padded("left"), "right": _padded("right")}
SETTINGS = {
    "grid": {},
    "reduced": {"router_rank": 2},
    "paired": {"expert_layout": "paired", "r_b": 2, "num_clusters": 2},
    "strongest": {"router_top_k": 2},
    "no prior": {"use_prior": False, "fit": False},
    "formula": {"mixture_implementation": "reference"},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_losses_are_added_to_the_model_s(settings, batch):
    model = adapted(**settings)
    plain, _ = _train(model, batch)
    assert not hasattr(plain, LOSS)
    balance, z = _by_hand(model, batch, settings.get("router_top_k"))
    config = model.peft_config["default"]
    for coefficients in ((0.3, 0.0), (0.0, 0.02), (0.3, 0.02)):
        config.balance_loss_coef, config.router_z_loss_coef = coefficients
        output, _ = _train(model, batch)
        expected = coefficients[0] * balance + coefficients[1] * z
        assert output.loss.item() - plain.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert getattr(output, LOSS).item() == pytest.approx(expected, rel=1e-5)
        assert output["loss"] is output.loss and torch.equal(output.logits, plain.logits)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_other_architectures(kind):
    base = make_gpt2() if kind == "gpt2" else make_t5()
    base.loss_type = "ForCausalLM" if kind == "gpt2" else None
    model = adapted(kind, base=base)
    batch = BATCHES["right"]
    plain, _ = _train(model, batch)
    balance, _ = _by_hand(model, batch, masked=kind != "t5")  # whose layers see two kinds of tokens
    model.peft_config["default"].balance_loss_coef = 0.3
    output, _ = _train(model, batch)
    assert output.loss.item() - plain.loss.item() == pytest.approx(0.3 * balance, rel=1e-4, abs=1e-5)


def test_nothing_happens_outside_of_training():
    model, batch = adapted(**COEFFICIENTS), BATCHES["left"]
    plain = adapted()
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).loss, plain(**batch).loss)
    assert torch.equal(model.eval()(**batch).loss, plain(**batch).loss)
    with model.train().disable_adapter():
        output = model(**batch)
    assert torch.equal(output.loss, plain.get_base_model()(**batch).loss) or not hasattr(output, LOSS)


def test_each_adapter_has_its_own():
    model = adapted(**COEFFICIENTS)
    model.add_adapter("other", TRexConfig(r_a=1, r_b=2, use_prior=False, target_modules=["q_proj"]))
    randomize(model, "other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    batch = BATCHES["even"]
    (balance, z), (other, _) = _by_hand(model, batch), _by_hand(model, batch, name="other")
    output, _ = _train(model, batch)
    assert getattr(output, LOSS).item() == pytest.approx(0.3 * balance + 0.02 * z, rel=1e-5)
    model.peft_config["other"].balance_loss_coef = 0.7
    output, _ = _train(model, batch)
    assert getattr(output, LOSS).item() == pytest.approx(0.3 * balance + 0.02 * z + 0.7 * other, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"router_rank": 2}, {"mixture_implementation": "reference"}])
def test_gradient_checkpointing_changes_no_gradient(settings):
    model, batch = adapted(**settings, **COEFFICIENTS), BATCHES["left"]
    model.enable_input_require_grads()
    output, expected = _train(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers, forwards = [module for module in model.modules() if isinstance(module, TRexLayer)], []
    layers[0].register_forward_pre_hook(lambda layer, _: forwards.append(layer._channel.running.state))
    checkpointed, found = _train(model, batch)
    # More entries would keep graphs.
    assert len(forwards) == 2 and len(forwards[0].losses.by_adapter["default"]) == len(layers)
    torch.testing.assert_close(getattr(checkpointed, LOSS), getattr(output, LOSS))
    torch.testing.assert_close(found, expected)
    assert any("trex_router" in name and grad.abs().max() > 1e-3 for name, grad in found.items())


def test_reentrant_checkpointing_is_refused():
    model = adapted(**COEFFICIENTS)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"use_reentrant=False"):
        _train(model, BATCHES["even"])
    model.peft_config["default"].balance_loss_coef = model.peft_config["default"].router_z_loss_coef = 0.0
    _train(model, BATCHES["even"])


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def _gradients_of_trainer(folder, size, times, labelled):
    """The gradients at the end of a step of `times` batches of `size` rows."""
    model = adapted(router_z_loss_coef=0.5)
    kept = {}

    class Look(InOrder):
        def optimizer_hook(self, *_):
            kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    batch = answered(8, seed=3)
    for row, first in enumerate(labelled):  # how many labels are left out
        batch["labels"][row, : 5 + first] = -100
    args = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=times,
        max_grad_norm=0,
        learning_rate=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    data = [{key: value[row] for key, value in batch.items()} for row in range(8)]
    trainer = Look(model=model, args=args, train_dataset=data)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(trainer.optimizer_hook)
    trainer.train()
    assert kept
    return kept


def test_gradient_accumulation_counts_them_once(tmp_path):
    """The Trainer divides the model's loss by the labels of a step's batches; the z-loss is a mean over tokens."""
    labelled = [0, 1, 2, 3, 3, 2, 1, 0]  # as many in both halves
    whole = _gradients_of_trainer(tmp_path, 8, 1, labelled)
    torch.testing.assert_close(_gradients_of_trainer(tmp_path, 4, 2, labelled), whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "shifted", "expected"),
    [
        ({"labels": torch.ones(2, 3)}, True, 1),
        ({"num_items_in_batch": 8}, True, 1),
        ({"labels": torch.ones(2, 3), "num_items_in_batch": 8}, True, 0.5),
        ({"labels": torch.ones(2, 3), "num_items_in_batch": 8}, False, 0.75),
        ({"labels": torch.ones(2, 3), "shift_labels": torch.ones(1, 2), "num_items_in_batch": 8}, True, 0.25),
        ({"labels": torch.tensor([[1, -100, 1, 1]]), "num_items_in_batch": torch.tensor(8)}, True, 0.25),
    ],
)
def test_the_share_of_a_forward(inputs, shifted, expected):
    assert float(Inputs.of(inputs).share_of_loss(shifted)) == expected


def test_uneven_batches_share_them_by_their_labels():
    model, batch = adapted(router_z_loss_coef=0.5), BATCHES["even"]
    output, _ = _train(model, {**batch, "num_items_in_batch": 64})
    whole, _ = _train(model, batch)
    labels = batch["labels"][:, 1:].ne(-100).sum().item()
    assert getattr(output, LOSS).item() == pytest.approx(getattr(whole, LOSS).item() * labels / 64)


def test_a_loss_of_one_s_own_can_add_them():
    model, batch = adapted(**COEFFICIENTS).train(), answered(4)
    labels = batch.pop("labels")
    with pytest.warns(UserWarning, match=LOSS):
        output = model(**batch, completion_mask=labels.ne(-100).long())
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) + getattr(output, LOSS)
    expected, _ = _train(model, {**batch, "labels": labels})
    torch.testing.assert_close(loss, expected.loss)


UNUSED = "balance_loss_coef and router_z_loss_coef have no effect: the trainer computes a loss of its own"


def _own_loss(output):
    return output.logits.square().mean()


def _passed_by(model, optimizer):
    batch = answered(4)
    for _ in range(2):
        _own_loss(model(**batch)).backward()


def _passed_by_in_one_step(model, optimizer):
    _own_loss(model(**answered(4))).backward()
    optimizer.step()


def _passed_by_after_accumulation(model, optimizer):
    for _ in range(3):
        _own_loss(model(**answered(4))).backward()
    optimizer.step()


def _passed_by_with_two_forwards(model, optimizer):
    (_own_loss(model(**answered(4))) + _own_loss(model(**answered(4, seed=1)))).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "train",
    [_passed_by, _passed_by_in_one_step, _passed_by_after_accumulation, _passed_by_with_two_forwards],
)
def test_a_loss_of_one_s_own_that_passes_them_by_is_said_once(train):
    model = adapted(**COEFFICIENTS).train()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer)
        assert len(caught) == 1, "one step is enough to tell"
        train(model, optimizer)
    assert [str(warning.message).startswith(UNUSED) for warning in caught] == [True]


def _two_forwards_one_backward(model, batch):
    (model(**batch).loss + model(**answered(4, seed=1)).loss).backward()


def _one_of_two_forwards(model, batch):
    """The second forward's logits alone take part, as in a regularisation."""
    (model(**batch).loss + _own_loss(model(**answered(4, seed=1)))).backward()


def _eval_in_between(model, batch):
    loss = model(**batch).loss
    with torch.no_grad():
        model.eval()(**batch)
    loss.backward()
    model.train()


def _never_backward(model, batch):
    model(**batch)


def _a_gradient_before(model, batch):
    """A gradient penalty reaches the logits before the losses are reached."""
    output = model(**batch)
    torch.autograd.grad(output.logits.sum(), model.get_parameter(ROUTER), retain_graph=True)
    output.loss.backward()


def _accumulated(model, batch):
    for _ in range(3):
        (model(**batch).loss / 3).backward()


def _checkpointing(model, batch):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()


def _added_by_hand(model, batch):
    output = model(**batch)
    (_own_loss(output) + getattr(output, LOSS)).backward()


ROUTER = "base_model.model.model.layers.0.self_attn.q_proj.trex_router.default"


@pytest.mark.parametrize(
    "train",
    [
        _two_forwards_one_backward,
        _one_of_two_forwards,
        _eval_in_between,
        _never_backward,
        _a_gradient_before,
        _accumulated,
        _checkpointing,
        _added_by_hand,
    ],
)
def test_router_losses_that_are_used_raise_no_alarm(train):
    model, batch = adapted(**COEFFICIENTS).train(), answered(4)
    model.enable_input_require_grads()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            train(model, batch)
            optimizer.step()


def test_an_interrupted_forward_leaves_nothing_behind():
    model, batch = adapted(**COEFFICIENTS), BATCHES["even"]
    expected, _ = _train(model, batch)
    last = [module for module in model.modules() if isinstance(module, TRexLayer)][-1]
    handle = last.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    assert torch.equal(_train(model, batch)[0].loss, expected.loss)


@pytest.mark.parametrize("device", [None, torch.device("meta")])
def test_the_sum_is_on_the_device_that_is_asked_for(device):
    """As that of the model's loss, which may be another than a layer's."""
    losses = RouterLosses({"default": (0.5, 0.0)}, by_adapter={"default": [(torch.ones(()), torch.ones(()))]})
    assert losses.total(device).device == (device or torch.device("cpu"))


def test_they_travel_with_the_configuration(tmp_path):
    model = adapted(router_top_k=2, **COEFFICIENTS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    config = loaded.peft_config["default"]
    assert (config.balance_loss_coef, config.router_z_loss_coef, config.router_top_k) == (0.3, 0.02, 2)
    assert torch.equal(_train(loaded, BATCHES["left"])[0].loss, _train(model, BATCHES["left"])[0].loss)


def _used(model, batch):
    """How many experts share the router's weight: exp of the mean load's entropy, mean over the layers."""
    found = []

    def look(layer, args):
        logits = args[0] @ layer.trex_router["default"].T
        top_k = layer.trex_settings["default"].top_k
        load = (logits if top_k is None else keep_strongest(logits, top_k)).softmax(-1).flatten(0, 1).mean(0)
        found.append(torch.special.entr(load).sum().exp().item())

    layers = [module for module in model.modules() if isinstance(module, TRexLayer)]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return sum(found) / len(found)


def _collapsed(top_k):
    """A model whose routers send every token to the first expert."""
    model, batch = adapted(router_top_k=top_k), answered(16)
    means = {}
    layers = [module for module in model.modules() if isinstance(module, TRexLayer)]
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: means.update({layer: args[0].flatten(0, 1)}))
        for layer in layers
    ]
    with torch.no_grad():
        model(**batch)
        for handle in handles:
            handle.remove()
        for layer, x in means.items():
            # the direction on which all tokens have the same, in the sense of least squares
            direction = torch.linalg.lstsq(x, torch.full((len(x), 1), 16.0)).solution[:, 0]
            layer.trex_router["default"].zero_()[0] = direction
    return model, batch


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_collapsed_router_recovers(top_k):
    used = {}
    start, batch = _collapsed(top_k)
    before = _used(start, batch)
    for coefficient in (0.0, 10.0):
        model = copy.deepcopy(start).train()
        model.peft_config["default"].balance_loss_coef = coefficient
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
            optimizer.step()
        used[coefficient] = _used(model, batch)
    # Of six experts, the loss brings at least one more into use than there were, and than training alone does.
    assert max(before, used[0.0]) + 1 < used[10.0] > 3.6, (before, used)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"router_top_k": 2}, {"use_prior": False, "fit": False}])
def test_one_graph_with_them(settings):
    model = adapted(**settings, **COEFFICIENTS).train()
    batch = {**BATCHES["left"], "position_ids": torch.arange(9)[None].expand(3, -1)}
    expected, gradients = _train(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output, found = _train(compiled, batch)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-5)
    found = {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-4)
