"""An adapter that trains the token embedding brings the frozen one along, which its prior reads.

The base model has new tokens, whose rows are random: others each time that it is made.
"""

import copy

import pytest
import torch
from conftest import VOCAB, adapted, make_llama, prompts, randomize
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_trex import (
    SemanticRouter,
    TRexConfig,
    calibrate_trex_merge,
    initialize_trex_prior,
    save_trex_as_lora,
)
from peft_trex.prior.inputs import Inputs

NEW = 4
ROWS = "base_model.trex_prior.token_rows"
IDS = "base_model.trex_prior.token_ids"


class Scaled(nn.Embedding):
    """An embedding that multiplies its rows, as Gemma's does."""

    def forward(self, ids):
        return 1.7 * super().forward(ids)


def grown(seed, embedding=nn.Embedding):
    """The tiny Llama with new tokens, whose rows the seed draws."""
    base = make_llama()
    torch.manual_seed(seed)
    base.resize_token_embeddings(VOCAB + NEW, mean_resizing=False)
    base.model.embed_tokens.__class__ = embedding
    return base.eval()


def with_new_tokens(count=32):
    """Prompts, each of which begins with new tokens."""
    generator = torch.Generator().manual_seed(3)
    return torch.cat([torch.randint(VOCAB, VOCAB + NEW, (count, 3), generator=generator), prompts(count)], 1)


def build(base, modules_to_save=("embed_tokens", "lm_head"), trained=(5, VOCAB + 1), **settings):
    """A fitted adapter, in which training has changed the rows of some tokens."""
    options = {"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM", **settings}
    model = randomize(get_peft_model(base, TRexConfig(modules_to_save=list(modules_to_save), **options)))
    data = [{"input_ids": ids} for ids in with_new_tokens().split(8)]
    initialize_trex_prior(model, data, progress=False)
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].weight[list(trained)] += 0.5
    return model.eval()


def save(model, path):
    model.save_pretrained(path, save_embedding_layers=False)
    return load_file(path / "adapter_model.safetensors")


@torch.no_grad()
def logits_of(model):
    ids = with_new_tokens(4)
    return model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < 8, -100)).logits


@pytest.mark.parametrize("embedding", [nn.Embedding, Scaled])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_reads_the_rows_that_it_was_fitted_on(tmp_path, embedding, low_cpu_mem_usage):
    model = build(grown(1, embedding))
    expected = logits_of(model)
    file = save(model, tmp_path)
    base = grown(2, embedding)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=0)
    after = get_base_model_state_dict(loaded)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # Only the new tokens' rows are kept, and what is saved again is the same.
    assert loaded.base_model.trex_prior["default"].token_ids.tolist() == list(range(VOCAB, VOCAB + NEW))
    again = save(loaded, tmp_path / "again")
    assert again.keys() == file.keys() and all(torch.equal(again[key], file[key]) for key in file)


def test_the_file_holds_the_rows_that_training_has_changed_and_memory_none(tmp_path):
    model = build(grown(1))
    tensors = save(model, tmp_path)
    assert tensors[IDS].tolist() == [5, VOCAB + 1]
    assert torch.equal(tensors[ROWS], model.get_input_embeddings().original_module.weight[[5, VOCAB + 1]])
    assert model.base_model.trex_prior["default"].token_ids is None
    # Before training all rows are equal, and the file says so, because the base model's may be others.
    untrained = build(grown(1), trained=())
    assert save(untrained, tmp_path / "untrained")[ROWS].shape == (0, 32)
    loaded = PeftModel.from_pretrained(grown(2), tmp_path / "untrained")
    torch.testing.assert_close(logits_of(loaded), logits_of(untrained), rtol=0, atol=0)


def test_onto_the_same_base_model_nothing_is_kept(tmp_path):
    model = build(grown(1))
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(grown(1), tmp_path)
    assert loaded.base_model.trex_prior["default"].token_ids is None
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)


def test_rounding_to_another_dtype_keeps_no_rows(tmp_path):
    save(build(grown(1)), tmp_path)
    halved = PeftModel.from_pretrained(grown(1).bfloat16(), tmp_path)
    assert halved.base_model.trex_prior["default"].token_ids is None
    halved = PeftModel.from_pretrained(grown(2).bfloat16(), tmp_path)
    assert halved.base_model.trex_prior["default"].token_ids.tolist() == list(range(VOCAB, VOCAB + NEW))
    save(build(grown(1).bfloat16()), tmp_path / "half")
    whole = PeftModel.from_pretrained(grown(1), tmp_path / "half")
    assert whole.base_model.trex_prior["default"].token_ids is None


@pytest.mark.parametrize("modules_to_save", [["lm_head"], ["embed_tokens"]])
def test_other_adapters_files_hold_no_rows(tmp_path, modules_to_save):
    external = {"prior_encoder": "external", "prior_dim": 5} if modules_to_save == ["embed_tokens"] else {}
    model = adapted(base=make_llama(), fit=not external, modules_to_save=modules_to_save, **external)
    assert not {IDS, ROWS} & save(model, tmp_path).keys()
    no_prior = adapted(base=make_llama(), fit=False, modules_to_save=modules_to_save, use_prior=False)
    assert not any("token_" in key for key in save(no_prior, tmp_path / "no prior"))


def test_an_older_file_without_rows_reads_the_base_model(tmp_path):
    model = build(grown(1))
    expected = logits_of(model)
    tensors = save(model, tmp_path)
    save_file({key: tensor for key, tensor in tensors.items() if key not in (IDS, ROWS)}, tmp_path / "old.safetensors")
    loaded = PeftModel.from_pretrained(grown(2), tmp_path)
    older = load_file(tmp_path / "old.safetensors")
    # The rows of the file that was loaded before are gone with it.
    set_peft_model_state_dict(loaded, older)
    assert loaded.base_model.trex_prior["default"].token_ids is None
    same_base = PeftModel.from_pretrained(grown(1), tmp_path)
    set_peft_model_state_dict(same_base, older)
    torch.testing.assert_close(logits_of(same_base), expected, rtol=0, atol=0)


def test_state_dicts_replace_rows_by_others():
    """As many as the new ones are, which may be more or fewer than those that are there."""
    wider = grown(2)
    with torch.no_grad():
        wider.model.embed_tokens.weight[7] += 1
    first, second = build(grown(1)), build(wider)
    target = build(grown(3))
    for source in (first, second):
        set_peft_model_state_dict(target, get_peft_model_state_dict(source, save_embedding_layers=False))
        torch.testing.assert_close(logits_of(target), logits_of(source), rtol=0, atol=0)
    assert len(target.base_model.trex_prior["default"].token_ids) == NEW + 1
    shorter = get_peft_model_state_dict(build(grown(3)), save_embedding_layers=False)
    set_peft_model_state_dict(target, shorter)
    assert target.base_model.trex_prior["default"].token_ids is None


def test_a_resumed_training_reads_the_rows_of_its_checkpoint(tmp_path):
    """A Trainer loads its checkpoint into an adapter that exists, beside rows that were drawn anew."""
    model = build(grown(1))
    save(model, tmp_path)
    resumed = build(grown(2))
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits_of(resumed), logits_of(model), rtol=0, atol=0)


def test_each_adapter_has_rows_of_its_own(tmp_path):
    models = [build(grown(seed), num_clusters=3 + seed) for seed in (1, 2)]
    for index, model in enumerate(models):
        save(model, tmp_path / str(index))
    loaded = PeftModel.from_pretrained(grown(3), tmp_path / "0", adapter_name="first")
    loaded.load_adapter(tmp_path / "1", "second")
    for name, model in zip(("first", "second"), models, strict=True):
        loaded.set_adapter(name)
        torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "both", save_embedding_layers=False)
    loaded.delete_adapter("first")
    torch.testing.assert_close(logits_of(loaded), logits_of(models[1]), rtol=0, atol=0)
    for name, model in zip(("first", "second"), models, strict=True):
        again = PeftModel.from_pretrained(grown(4), tmp_path / "both" / name)
        torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=0)
    # The names of the rows do not stay behind in the other adapter's file.
    loaded.delete_adapter("second")
    assert not [name for name, _ in loaded.named_buffers() if "token_" in name]


def test_two_active_adapters_read_their_own_rows(tmp_path):
    """One trains the embedding and has rows of its own, and the other reads the base model's."""
    save(build(grown(1)), tmp_path)
    loaded = PeftModel.from_pretrained(grown(2), tmp_path)
    loaded.add_adapter("plain", TRexConfig(r_a=2, r_b=3, num_clusters=4, task_type="CAUSAL_LM"))
    loaded.base_model.trex_prior["plain"].load_state_dict(loaded.base_model.trex_prior["default"].state_dict())
    loaded.base_model.trex_prior["plain"].token_ids = loaded.base_model.trex_prior["plain"].token_rows = None
    scorer, inputs = loaded.base_model.prompts.scorer, {"input_ids": with_new_tokens(4)}
    embeds = {name: scorer.embed(inputs, name)[0] for name in ("default", "plain")}
    assert (embeds["default"] - embeds["plain"]).abs().max() > 0.01
    scored = scorer.score(Inputs.of(inputs), None, ["plain", "default"])
    for name, prior in loaded.base_model.trex_prior.items():
        torch.testing.assert_close(scored.last[name], prior.score(embeds[name]))


def test_the_embedding_that_peft_saves_takes_the_base_models_place(tmp_path):
    """With a warning, because the base model then computes something else, too."""
    model = build(grown(1))
    expected = logits_of(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match=r"original_module.weight, .*: 4 of its rows take the base model's place"):
        loaded = PeftModel.from_pretrained(grown(2), tmp_path)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=0)
    assert loaded.base_model.trex_prior["default"].token_ids is None


def test_a_copy_and_another_dtype_keep_the_rows(tmp_path):
    save(build(grown(1)), tmp_path)
    loaded = PeftModel.from_pretrained(grown(2), tmp_path)
    torch.testing.assert_close(logits_of(copy.deepcopy(loaded)), logits_of(loaded), rtol=0, atol=0)
    assert loaded.bfloat16().base_model.trex_prior["default"].token_rows.dtype == torch.bfloat16
    logits_of(loaded)


def test_the_exported_router_reads_the_rows(tmp_path):
    model = build(grown(1))
    save(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(grown(2), tmp_path / "adapter")
    routers = []
    for name, one in (("first", model), ("second", loaded)):
        data = [{"input_ids": ids} for ids in with_new_tokens().split(8)]
        calibrate_trex_merge(one, data, per_cluster=True, progress=False)
        save_trex_as_lora(one, tmp_path / name, save_embedding_layers=False)
        routers.append(load_file(tmp_path / name / "router.safetensors"))
        assert SemanticRouter.from_pretrained(tmp_path / name).clusters
        assert not any("token_rows" in key for key in load_file(tmp_path / name / "adapter_model.safetensors"))
    torch.testing.assert_close(routers[1]["token_scores"], routers[0]["token_scores"], rtol=0, atol=0)


def _without_ids(tensors):
    del tensors[IDS]


def _other(key, value):
    return lambda tensors: tensors.update({key: value})


@pytest.mark.parametrize(
    "damage",
    [
        _without_ids,
        _other(IDS, torch.tensor([VOCAB + 1, 5])),
        _other(IDS, torch.tensor([5, VOCAB + NEW])),
        _other(IDS, torch.tensor([-1, 5])),
        _other(IDS, torch.tensor([5.0, 6.0])),
        _other(ROWS, torch.zeros(2, 31)),
        _other(ROWS, torch.zeros(3, 32)),
        lambda tensors: tensors[ROWS].view(-1)[5:6].fill_(float("nan")),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, damage):
    tensors = save(build(grown(1)), tmp_path)
    damage(tensors)
    model = build(grown(2))
    before = logits_of(model)
    with pytest.raises(ValueError, match=r"token_rows.*restore"):
        set_peft_model_state_dict(model, tensors)
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The adapter file holds .*, saved with save_embedding_layers")
def test_rows_without_a_prior_to_read_them_are_refused(tmp_path):
    tensors = save(build(grown(1)), tmp_path)
    model = adapted(base=grown(2), fit=False, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="no trained token embedding"):
        set_peft_model_state_dict(model, tensors)


def test_a_state_dict_without_the_frozen_embedding_warns_once():
    """As ZeRO-3 makes it, which leaves frozen weights out and holds an empty one itself."""
    model = build(grown(1))
    state = {key: tensor for key, tensor in model.state_dict().items() if "original_module" not in key}
    # The weight is at hand.
    kept = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    assert kept[IDS].tolist() == [5, VOCAB + 1]
    model.get_input_embeddings().original_module.weight.ds_id = 0
    with pytest.warns(UserWarning, match="frozen token embedding, which the prior reads, is not in the state dict"):
        tensors = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    assert not {IDS, ROWS} & tensors.keys()


@pytest.mark.slow
def test_the_rows_are_read_in_one_compiled_graph(tmp_path):
    model = build(grown(1))
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(grown(2), tmp_path)
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled), logits_of(model))
