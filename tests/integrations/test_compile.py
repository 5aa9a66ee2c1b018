"""torch.compile: one graph for the forward, none anew for other prompts, eager's results. torch.export of a merge."""

import contextlib

import pytest
import torch
from conftest import CACHE, adapted, answered, make_gpt2, make_llama, prompts, randomize
from peft import PeftModel
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from peft_trex import TRexConfig, initialize_trex_prior

UNFITTED = "ignore:The semantic prior of the adapter"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _tiny(**kwargs):
    """Tracing takes the time, so that one block with two adapted layers has to do."""
    return adapted(base=make_llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"], **kwargs)


def _batch(seed):
    batch = answered(3, seed=seed)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def _packed(seed):
    """One row of two sequences, cut at another place for each seed."""
    ids, cut = prompts(1, length=14, seed=seed), 6 + seed
    positions = torch.cat([torch.arange(cut), torch.arange(14 - cut)])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions < 3, -100)}


def _step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_compiles(model, steps, backend="aot_eager", graphs=1):
    """Compiled in one graph by the first step, which the others run again, with eager's outputs and gradients."""
    expected = [_step(model, batch) for batch in steps]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for number, (batch, (logits, gradients)) in enumerate(zip(steps, expected, strict=True)):
        with dynamo.patch(error_on_recompile=True) if number else contextlib.nullcontext():
            found, found_gradients = _step(compiled, batch)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
        assert {name.removeprefix("_orig_mod.") for name in found_gradients} == set(gradients)
        for name, gradient in found_gradients.items():
            torch.testing.assert_close(gradient, gradients[name.removeprefix("_orig_mod.")], rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs


CASES = {
    "llama": {},
    "gpt2": {"kind": "gpt2"},
    "learned map": {"num_clusters": 5},
    "whitened prior": {"prior_whitening": 5},
    "no prior, reduced router": {"use_prior": False, "fit": False, "router_rank": 2},
    "strongest experts": {"router_top_k": 2},
    "no router, paired": {"use_router": False, "expert_layout": "paired", "r_a": 4, "r_b": 4},
    "shared core": {"use_router": False, "shared_core": True, "r_a": 3, "r_b": 3, "prior_whitening": "auto"},
    "unfitted": {"fit": False},
}


@pytest.mark.slow
@pytest.mark.filterwarnings(UNFITTED)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_one_graph_for_every_step(settings):
    if settings.get("kind") == "gpt2":
        base = make_gpt2()
        base.loss_type = "ForCausalLM"  # it has none, and a warning of transformers about that breaks the graph
        model = adapted(base=base, **settings)
    else:
        model = _tiny(**settings)
    model.train()
    _assert_compiles(model, [_batch(seed) for seed in range(3)])


@pytest.mark.slow
def test_one_graph_for_packed_rows():
    model = _tiny().train()
    _assert_compiles(model, [_packed(seed) for seed in range(3)])


@pytest.mark.slow
def test_one_graph_for_external_embeddings():
    model = _tiny(fit=False, prior_encoder="external", prior_dim=5, r_a=1, num_clusters=3)
    initialize_trex_prior(model, embeddings=torch.randn(30, 5), progress=False)
    positions = torch.arange(9)[None].expand(3, -1)
    rows = [{**_batch(seed), "semantic_embeds": torch.randn(3, 5), "position_ids": positions} for seed in range(3)]
    _assert_compiles(model.train(), rows)
    _assert_compiles(model, [{**_packed(seed), "semantic_embeds": torch.randn(2, 5)} for seed in range(3)], graphs=2)


@pytest.mark.slow
def test_one_graph_straight_after_loading(tmp_path):
    """Nothing that is found out lazily, in a first eager forward, is missing."""
    model = _tiny()
    model.save_pretrained(tmp_path)
    expected = model(prompts(3)).logits
    loaded = PeftModel.from_pretrained(make_llama(num_hidden_layers=1), tmp_path)
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(prompts(3)).logits, expected, rtol=1e-4, atol=1e-5)
    single = {"input_ids": prompts(3, length=1), "position_ids": torch.zeros(1, 1, dtype=torch.long)}
    expected = model(**single).logits
    torch.testing.assert_close(compiled(**single).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_active_adapters_and_switching():
    model = _tiny()
    model.add_adapter("other", TRexConfig(r_a=1, r_b=2, use_prior=False, target_modules=["q_proj", "up_proj"]))
    randomize(model, "other", seed=1)
    ids = prompts(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        expected = model(ids).logits
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        expected = model(ids).logits
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_cache_carries_the_prior_out_of_a_compiled_forward():
    model = _tiny()
    ids = prompts(3)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        outputs = []
        for function in (model, compiled):
            first = function(ids[:, :-1], position_ids=torch.arange(8)[None], logits_to_keep=4)
            outputs.append(function(ids[:, -1:], **{CACHE: first[CACHE]}).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_gives_eagers_results():
    _assert_compiles(_tiny().train(), [_batch(0), _batch(1)], backend="inductor")


@pytest.mark.slow
def test_trainer_with_torch_compile_has_the_eager_losses(tmp_path):
    losses = []
    for compiled in (False, True):
        model = _tiny()
        rows = [
            dict(zip(("input_ids", "labels"), row, strict=True)) for row in zip(*answered(16).values(), strict=True)
        ]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, torch_compile=compiled, learning_rate=1e-2,
            torch_compile_backend="aot_eager" if compiled else None,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert counters["stats"]["unique_graphs"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(set(losses[0])) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:T-REX depends on its input")
def test_a_merged_model_can_be_exported():
    merged = adapted(base=make_llama(num_hidden_layers=1, use_cache=False)).merge_and_unload()
    ids = prompts(3)
    exported = torch.export.export(merged, (), {"input_ids": ids, "use_cache": False})
    other = prompts(3, seed=5)
    torch.testing.assert_close(
        exported.module()(input_ids=other, use_cache=False).logits, merged(other).logits, rtol=1e-4, atol=1e-5
    )
