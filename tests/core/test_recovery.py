"""After a failure, an interruption or a second try, and from several threads: nothing left over, nothing mixed up."""

import threading

import pytest
import torch
from conftest import BEFORE_5, CACHE, PAD, adapted, answered, batches, make_llama, prompts, randomize
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from peft_trex import TRexConfig, TRexLayer, initialize_trex_prior
from peft_trex.prior.inputs import Inputs

SETTINGS = {"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM"}


@pytest.mark.filterwarnings("ignore:Already found:UserWarning", "ignore:You are trying to modify:UserWarning")
def test_the_same_base_model_wrapped_twice(tmp_path):
    ids = prompts(3)
    for name, seed in (("a", 1), ("b", 2)):
        model = adapted(fit=False)
        randomize(model, seed=seed)
        initialize_trex_prior(model, batches(seed=seed), progress=False, seed=seed)
        model.save_pretrained(tmp_path / name)
    expected = PeftModel.from_pretrained(make_llama(), tmp_path / "b")(input_ids=ids).logits
    base = make_llama()
    PeftModel.from_pretrained(base, tmp_path / "a")
    again = PeftModel.from_pretrained(base, tmp_path / "b")
    torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=0)
    assert len(base._forward_pre_hooks) == 1
    again.unload()
    assert not base._forward_pre_hooks and "generate" not in vars(base)


@pytest.mark.filterwarnings("ignore:Already found:UserWarning", "ignore:You are trying to modify:UserWarning")
def test_a_failed_injection_leaves_the_base_model_free_for_another():
    base = make_llama()
    with pytest.raises(ValueError, match="norm is a LlamaRMSNorm"):
        get_peft_model(base, TRexConfig(target_modules=["q_proj", "norm"], **SETTINGS))
    assert not any(isinstance(module, TRexLayer) for module in base.modules())
    model = adapted(base=base, target_modules=["q_proj"])
    expected = adapted(target_modules=["q_proj"])
    torch.testing.assert_close(model(input_ids=prompts(3)).logits, expected(input_ids=prompts(3)).logits)


def test_an_interrupted_forward_or_generate_is_forgotten():
    model = adapted()
    ids = prompts(2)
    expected = model(input_ids=ids[1:]).logits
    generated = model.generate(ids[1:], max_new_tokens=5, do_sample=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    for call in (model, lambda input_ids: model.generate(input_ids, max_new_tokens=5)):
        handle = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(input_ids=ids[:1])
        handle.remove()
        torch.testing.assert_close(model(input_ids=ids[1:]).logits, expected, rtol=0, atol=0)
        assert torch.equal(model.generate(ids[1:], max_new_tokens=5, do_sample=False), generated)


def test_threads_do_not_share_a_prior():
    model = adapted()
    ids = prompts(4)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    expected = [model.generate(row[None], **settings) for row in ids]
    found = {}

    def serve(index):
        found[index] = [model.generate(ids[index][None], **settings) for _ in range(4)]

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tokens in enumerate(expected):
        assert len(found[index]) == 4
        assert all(torch.equal(tokens, other) for other in found[index])


def test_adapters_called_like_parts_of_a_name(tmp_path):
    model = adapted()
    ids = prompts(3)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    names = ["0", "1", "model", "q_proj", "mean", "trex_A"]
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, adapter_name=names[0])
    for name in names[1:]:
        loaded.load_adapter(tmp_path, adapter_name=name)
    for name in names:
        loaded.set_adapter(name)
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=0)


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self):
        self.given = 0

    def __iter__(self):
        for row in prompts(64):
            self.given += 1
            yield {"input_ids": row}


def test_a_stream_is_read_as_far_as_asked():
    stream = _Stream()
    loader = torch.utils.data.DataLoader(stream, batch_size=8)
    assert initialize_trex_prior(adapted(fit=False), loader, max_batches=2, progress=False).prompts == 16
    assert stream.given == 16
    assert initialize_trex_prior(adapted(fit=False), loader, progress=False).prompts == 64


@pytest.mark.parametrize("target", [None, "all-linear"])
@pytest.mark.parametrize(
    ("model_class", "task_type", "head"),
    [
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
        (BertForSequenceClassification, "SEQ_CLS", "classifier"),
    ],
)
def test_heads_are_trained_in_full_and_unload(model_class, task_type, head, target):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = model_class(BertConfig(vocab_size=64, **sizes))
    settings = {**SETTINGS, "task_type": task_type, "target_modules": target}
    if task_type == "SEQ_CLS":
        settings["modules_to_save"] = ["pooler"]
    model = get_peft_model(base, TRexConfig(**settings))
    initialize_trex_prior(model, batches(), progress=False)
    assert not any(isinstance(module, TRexLayer) for module in getattr(base, head).modules())
    assert any(head in name and parameter.requires_grad for name, parameter in model.named_parameters())
    model(input_ids=prompts(3))
    with pytest.warns(UserWarning, match="approximately"):
        plain = model.merge_and_unload()
    plain(input_ids=prompts(3))


@pytest.mark.filterwarnings("ignore:T-REX depends:UserWarning")
def test_layers_of_which_some_are_merged():
    model = adapted(target_modules=["q_proj"])
    ids = prompts(3)
    expected = model(input_ids=ids).logits
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    layer.merge()
    model(input_ids=ids)
    layer.unmerge()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_noise_on_the_embedding_does_not_reach_the_prior():
    """NEFTune adds noise to the embedding's output in training, by a hook."""
    model = adapted().train()
    tuner = model.base_model
    embedding = tuner.input_embedding()
    inputs = Inputs.of({"input_ids": prompts(3)})
    clean = tuner.prompts.scorer.embed(inputs)[0]
    embedding.register_forward_hook(lambda m, args, out: out + torch.randn_like(out) if m.training else out)
    torch.testing.assert_close(tuner.prompts.scorer.embed(inputs)[0], clean, rtol=0, atol=0)
    assert embedding.training


def test_training_without_labels_says_what_that_means():
    model = adapted().train()
    with pytest.warns(UserWarning, match="A training forward got neither labels"):
        model(input_ids=prompts(3))
    model(input_ids=prompts(3))  # a second warning would be an error here
    model = adapted().train()
    model(**answered(3))
    model.eval()(input_ids=prompts(3))


def test_generate_goes_on_from_what_the_prompt_left():
    t5 = adapted("t5")
    ids = prompts(3)
    settings = {"max_new_tokens": 6, "do_sample": False}
    encoded = t5.get_encoder()(input_ids=ids)
    assert torch.equal(t5.generate(encoder_outputs=encoded, **settings), t5.generate(input_ids=ids, **settings))
    model = adapted()
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, TRexLayer))
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer._channel.scores("default", args[0])))
    first = model.generate(ids, return_dict_in_generate=True, **settings)
    if not BEFORE_5:  # which wants the whole sequence beside a cache
        cached = first[CACHE].get_seq_length()
        new = torch.cat([first.sequences, prompts(3, seed=9)], 1)[:, cached:]
        mask = torch.ones(3, cached + new.shape[1], dtype=torch.long)
        assert all(torch.equal(scores, seen[0]) for scores in seen)
        # More tokens are a new prompt, of which all before it is part.
        del seen[:]
        with pytest.warns(UserWarning, match="computed with another prior"):
            model.generate(new, **{CACHE: first[CACHE]}, attention_mask=mask, **settings)
        tuner = model.base_model
        whole = tuner.prompts.scorer.embed({"input_ids": torch.cat([first.sequences[:, :cached], new], 1)})[0]
        for scores in seen:
            torch.testing.assert_close(scores, tuner.trex_prior["default"].score(whole))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids is a list"),
        ({"input_ids": torch.ones(2, 3, 4, 5, dtype=torch.long)}, ValueError, r"\(2, 3, 4, 5\)"),
        ({"input_ids": prompts(2), "attention_mask": {"full": None}}, ValueError, "attention_mask is dict"),
        ({"input_ids": prompts(2), "attention_mask": torch.ones(2, 1, 9, 9)}, ValueError, r"\(2, 1, 9, 9\)"),
    ],
)
def test_inputs_in_which_no_prompt_can_be_found(inputs, error, message):
    with pytest.raises(error, match=message):
        adapted().base_model.prompts.scorer.embed(Inputs.of(inputs))


def test_one_prompt_many_times_is_nothing_to_cluster():
    model = adapted(fit=False, num_clusters=1)
    with pytest.raises(ValueError, match="same embedding"):
        initialize_trex_prior(model, [{"input_ids": prompts(1).repeat(5, 1)}], progress=False)


def test_integer_weights_are_refused():
    base = nn.Sequential(nn.Linear(3, 3))
    base[0].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="floating-point"):
        get_peft_model(base, TRexConfig(target_modules=["0"], use_prior=False))
