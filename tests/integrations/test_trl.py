"""TRL's trainers: `peft_config=TRexConfig(...)` and the callback are all that changes.

Each token gets the prior of its own prompt: in rows that hold several, and in training as in generation.
"""

import math
import re
import warnings

import pytest
import torch
from conftest import PAD, adapted, make_llama
from peft import get_peft_model
from texts import make_chat_tokenizer, make_tokenizer, pairs, rows, text
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, LlamaForSequenceClassification

from peft_trex import TRexConfig, TRexPriorCallback, chat_markers, initialize_trex_prior
from peft_trex.router_losses import LOSS

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")
PackingCollator = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SETTINGS = {"r_a": 2, "r_b": 3, "num_clusters": 4, "task_type": "CAUSAL_LM"}


def _args(kind, folder, **kwargs):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
    }
    return getattr(trl, f"{kind}Config")(**{**settings, **kwargs})


def _trainer(kind, folder, data, model=None, callbacks=None, tokenizer=None, **kwargs):
    """A trainer of TRL's; without a model, one on a fresh base model with `peft_config`."""
    extra = {"reward_funcs": kwargs.pop("reward_funcs")} if "reward_funcs" in kwargs else {}
    given = {"model": make_llama(), "peft_config": TRexConfig(**SETTINGS)} if model is None else {"model": model}
    return getattr(trl, f"{kind}Trainer")(
        args=_args(kind, folder, **kwargs),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer or make_tokenizer(),
        callbacks=[TRexPriorCallback(progress=False)] if callbacks is None else callbacks,
        **given,
        **extra,
    )


def _logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _prior(model, name="default"):
    return model.base_model.trex_prior[name]


def _watch(model, adapter_name="default"):
    """A list that gets the scores of every forward from now on, as the first adapted layer sees them."""
    seen = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj

    def note(layer, args):
        if not layer.disable_adapters and layer.active_adapters == [adapter_name]:
            seen.append((args[0], layer._channel.scores(adapter_name, args[0])))

    layer.register_forward_pre_hook(note)
    return seen


def _expected_scores(model, token_lists):
    """The prior's scores of prompts, computed one by one."""
    table = model.base_model.input_embedding().weight.detach()
    return _prior(model).score(torch.stack([table[torch.tensor(ids)].mean(0) for ids in token_lists]))


def _gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


FLATTENED = {
    "trl padding-free": lambda data: PackingCollator(PAD, padding_free=True)(data),
    "trl padded up": lambda data: PackingCollator(PAD, padding_free=True, pad_to_multiple_of=16)(data),
    "trl packed": lambda data: PackingCollator(PAD, padding_free=True)(
        [
            {
                "input_ids": [token for row in part for token in row["input_ids"]],
                "labels": [label for row in part for label in row["labels"]],
                "seq_lengths": [len(row["input_ids"]) for row in part],
            }
            for part in (data[:2], data[2:])
        ]
    ),
    "transformers": lambda data: DataCollatorWithFlattening()(data),
    "transformers, with all it has": lambda data: DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True
    )(data),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("collator", list(FLATTENED))
def test_a_flattened_row_equals_the_padded_batch(collator, attention):
    base = make_llama(attn_implementation=attention)
    model = adapted(base=base, num_clusters=5, prior_map="learned")
    data = rows(5)
    results = []
    for batch in (PackingCollator(PAD)(data), FLATTENED[collator](data)):
        labels = batch["labels"]
        assert ("attention_mask" in batch) == (labels.shape[0] > 1)
        logits = model(**batch, use_cache=False).logits  # with a cache, transformers does not tell sequences apart
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        model.zero_grad()
        loss.backward()
        filled = batch["attention_mask"] > 0 if "attention_mask" in batch else torch.ones_like(labels) > 0
        results.append((logits[filled][:45].detach(), loss.detach(), _gradients(model)))
    assert any("trex_map" in name for name in results[0][2])
    for padded, flat in zip(*results, strict=True):
        torch.testing.assert_close(flat, padded, atol=2e-5, rtol=1e-4)


def test_sft_trains_alike_packed_and_not(tmp_path):
    """Each step sees all rows, so that how they are laid out must not matter."""
    data = [{"prompt": text(prompt), "completion": " " + text(answer)} for prompt, answer in pairs()]
    flat = {"padding_free": True, "max_length": None}  # gradient checkpointing is TRL's default
    modes = [{"gradient_checkpointing": False}, {"packing": True, "max_length": 32}, flat]
    modes.append({**flat, "gradient_checkpointing_kwargs": {"use_reentrant": True}})
    curves = []
    for mode in modes:
        torch.manual_seed(0)
        trainer = _trainer("SFT", tmp_path, data, per_device_train_batch_size=16, max_steps=4, **mode)
        batches = [PackingCollator(PAD)(rows(16))]
        initialize_trex_prior(trainer.model, batches, progress=False)
        trainer.train()
        curves.append(_logged(trainer))
    assert curves[0][-1] < curves[0][0] - 0.1
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "mode", [{}, {"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}], ids=str
)
def test_the_callback_fits_on_every_prompt_of_sft(tmp_path, mode):
    data = [{"prompt": text(prompt), "completion": " " + text(answer)} for prompt, answer in pairs()]
    trainer = _trainer("SFT", tmp_path, data, max_steps=1, **mode)
    trainer.train()
    _check_fit(trainer.model, [prompt for prompt, _ in pairs()])


def _check_fit(model, token_lists):
    """The prior was fitted on the mean embeddings of these prompts."""
    prior, table = _prior(model), model.base_model.input_embedding().weight.detach()
    assert prior.fitted
    mean = torch.stack([table[torch.tensor(ids)].mean(0) for ids in token_lists]).mean(0)
    torch.testing.assert_close(prior.mean, mean, atol=1e-5, rtol=1e-4)


def test_assistant_only_loss_trains_with_the_prior_that_generation_has(tmp_path):
    data = []
    for prompt, answer in pairs(8):
        turns = [{"role": "user", "content": text(prompt)}, {"role": "assistant", "content": text(answer)}]
        later = {"role": "user", "content": text(answer)}
        data.append({"messages": [*turns, later, turns[1]]})  # what is said later is no part of the prompt
    model = adapted()
    trainer = _trainer("SFT", tmp_path, data, model, assistant_only_loss=True, max_steps=1)
    seen = _watch(model)
    # This tokenizer has no word for what markers are looked for with.
    with pytest.warns(UserWarning, match="Some rows hold several answers"):
        trainer.train()
    tokens = [[3, *prompt, 4] for prompt, _ in pairs(8)]
    expected = _expected_scores(model, tokens)
    assert len(seen) == 2  # the forward, and gradient checkpointing's second run of it
    for _, scores in seen:
        # In the first turn; what follows is pooled with it.
        for score in scores[:, 0]:
            assert (expected - score).abs().amax(1).min() < 1e-5


TOKENIZER = make_chat_tokenizer()
# Their texts are as long as those of the other turns, and of other letters.
USERS = [f"{'abcd'[number % 4] * 5} {number}" for number in range(32)]
LAYOUTS = [{}, {"packing": True, "max_length": 96}, {"padding_free": True, "max_length": None}]


def _turn(role, content):
    return {"role": role, "content": content}


def _conversations():
    """Sixteen of two turns, half of them after a system prompt."""
    chats = []
    for number in range(16):
        turns = [_turn("system", "Be brief.")] if number % 2 else []
        for user in (USERS[2 * number], USERS[2 * number + 1]):
            turns += [_turn("user", user), _turn("assistant", user[:3] + "!")]
        chats.append(turns)
    return chats


def _chat_model(model=None):
    base = make_llama(vocab_size=400, max_position_embeddings=512)
    return get_peft_model(base, TRexConfig(**SETTINGS)) if model is None else model


def _watch_rows(model):
    """A list that gets each forward's ids and its scores, one for each token (B, T, K)."""
    seen, ids_of = [], []
    base = model.base_model.model
    base.register_forward_pre_hook(lambda _, args, kwargs: ids_of.append(kwargs["input_ids"]), with_kwargs=True)
    layer = base.model.layers[0].self_attn.q_proj

    def note(layer, args):
        if not layer.disable_adapters and layer.active_adapters == ["default"]:
            scores = layer._channel.scores("default", args[0])
            scores = scores if scores.dim() == 3 else scores[:, None].expand(*args[0].shape[:2], -1)
            seen.append((ids_of[-1], scores))

    layer.register_forward_pre_hook(note)
    return seen


def _scores_of(model, message):
    return _expected_scores(model, [TOKENIZER(message)["input_ids"]])[0]


def _check_turns(model, ids, scores):
    """Each token of a row, from the one before an answer to its end, has the prior of the message before it.

    Returns the number of answers.
    """
    text = TOKENIZER.decode(ids)
    ends = [len(TOKENIZER.decode(ids[: place + 1])) for place in range(len(ids))]
    pattern = r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
    turns = list(re.finditer(pattern, text))
    for turn in turns:
        # The token before an answer predicts its first one.
        places = [place for place, end in enumerate(ends) if turn.start(2) <= end <= turn.end(2)]
        assert len(places) > 3
        expected = _scores_of(model, turn[1]).expand(len(places), -1)
        torch.testing.assert_close(scores[places], expected, atol=1e-5, rtol=0)
    return len(turns)


def _check_chat_fit(trainer, messages):
    """The markers were found, and the prior was fitted on these messages."""
    assert trainer.model.peft_config["default"].chat_markers == chat_markers(TOKENIZER)
    _check_fit(trainer.model, [TOKENIZER(message)["input_ids"] for message in messages])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("assistant_only", [True, False])
def test_sft_of_chats_trains_each_answer_with_its_own_message(tmp_path, assistant_only, layout):
    data = [{"messages": turns} for turns in _conversations()]
    settings = {"assistant_only_loss": assistant_only, "max_steps": 2, "tokenizer": TOKENIZER, **layout}
    trainer = _trainer("SFT", tmp_path, data, _chat_model(), **settings)
    seen = _watch_rows(trainer.model)
    trainer.train()
    _check_chat_fit(trainer, USERS)
    assert sum(_check_turns(trainer.model, *row) for ids, scores in seen for row in zip(ids, scores, strict=True)) > 8
    # The markers travel with the adapter.
    trainer.save_model(tmp_path)
    assert TRexConfig.from_pretrained(tmp_path).chat_markers == chat_markers(TOKENIZER)
    # Generation sees, for each turn, what the training saw.
    for turns in _conversations()[:4]:
        for cut in range(1, len(turns)):
            if turns[cut]["role"] == "assistant":
                ids = TOKENIZER.apply_chat_template(
                    turns[:cut], add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                seen.clear()
                trainer.model.eval().generate(**ids, max_new_tokens=2, do_sample=False, eos_token_id=None)
                assert len(seen) == 2
                for _, scores in seen:
                    expected = _scores_of(trainer.model, turns[cut - 1]["content"])
                    torch.testing.assert_close(scores[0, -1], expected, atol=1e-5, rtol=0)


def test_sft_without_markers_takes_the_whole_conversation(tmp_path):
    data = [{"messages": turns} for turns in _conversations()]
    model = get_peft_model(make_llama(vocab_size=400), TRexConfig(**SETTINGS, chat_markers=False))
    trainer = _trainer("SFT", tmp_path, data, model, assistant_only_loss=True, max_steps=1, tokenizer=TOKENIZER)
    with pytest.warns(UserWarning, match="Some rows hold several answers"):
        trainer.train()
    assert trainer.model.peft_config["default"].chat_markers is False


def test_dpo_of_chats(tmp_path):
    """TRL has made a copy of the adapter, as the reference, before its prior is fitted."""
    data = []
    for turns in _conversations():
        data.append({"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [_turn("assistant", "no, no")]})
    trainer = _trainer("DPO", tmp_path, data, _chat_model(), max_steps=2, tokenizer=TOKENIZER)
    seen = _watch_rows(trainer.model)
    trainer.train()
    # Both rows of a pair hold both messages.
    _check_chat_fit(trainer, USERS)
    assert trainer.model.peft_config["ref"].chat_markers == chat_markers(TOKENIZER)
    torch.testing.assert_close(_prior(trainer.model, "ref").centroids, _prior(trainer.model).centroids)
    assert _logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert sum(_check_turns(trainer.model, *row) for ids, scores in seen for row in zip(ids, scores, strict=True)) > 16


def test_grpo_of_chats(tmp_path):
    data = [{"prompt": turns[:-1]} for turns in _conversations()]
    settings = {"max_completion_length": 4, "num_generations": 2, "max_steps": 2, "tokenizer": TOKENIZER}
    reward = {"reward_funcs": lambda completions, **_: [float(len(str(each))) for each in completions]}
    trainer = _trainer("GRPO", tmp_path, data, _chat_model(), **settings, **reward)
    seen = _watch_rows(trainer.model)
    trainer.train()
    # A prompt is the latest message, that of the second turn.
    _check_chat_fit(trainer, USERS[1::2])
    expected = torch.stack([_scores_of(trainer.model, message) for message in USERS[1::2]])
    lengths = [ids.shape[1] for ids, _ in seen]
    assert 1 in lengths and max(lengths) > 40
    for _, scores in seen:
        # The last message is that of the second turn.
        assert (scores[:, -1:] - expected[None]).abs().amax(-1).amin(1).max() < 1e-5


def test_completion_only_loss_off_counts_the_whole_row(tmp_path):
    data = [{"prompt": text(prompt), "completion": " " + text(answer)} for prompt, answer in pairs()]
    trainer = _trainer("SFT", tmp_path, data, completion_only_loss=False, max_steps=1)
    with pytest.warns(UserWarning, match="whole row counts as its prompt"):
        trainer.train()
    _check_fit(trainer.model, [[*prompt, *answer, 2] for prompt, answer in pairs()])


def test_sft_goes_on_from_a_checkpoint_as_if_unbroken(tmp_path):
    data = [{"prompt": text(prompt), "completion": " " + text(answer)} for prompt, answer in pairs()]
    mode = {"packing": True, "max_length": 32, "per_device_train_batch_size": 1}
    curves = []
    for steps, resume in ((6, False), (3, False), (6, True)):
        torch.manual_seed(9 if resume else 0)  # what is resumed must come from the checkpoint
        folder = tmp_path / ("broken" if curves else "unbroken")
        callback = TRexPriorCallback(seed=123 if resume else 0, progress=False)
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 3, "callbacks": [callback], **mode}
        trainer = _trainer("SFT", folder, data, **settings)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        curves.append(_logged(trainer))
    unbroken, _, resumed = curves
    torch.testing.assert_close(resumed[-3:], unbroken[-3:], atol=1e-5, rtol=0)


def _preferences():
    return [
        {"prompt": text(prompt), "chosen": " " + text(answer), "rejected": " " + text([*answer[::-1], 5])}
        for prompt, answer in pairs()
    ]


def test_dpo_learns_against_the_base_model(tmp_path):
    trainer = _trainer("DPO", tmp_path, _preferences(), max_steps=12)
    seen = _watch(trainer.model)
    trainer.train()
    losses = _logged(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)  # the adapter starts as the base model, the reference
    assert losses[-1] < 0.6
    _check_fit(trainer.model, [prompt for prompt, _ in pairs()])
    for _, scores in seen:  # prompts with chosen answers, then the same with rejected ones
        torch.testing.assert_close(*scores.chunk(2))
    assert len(seen) == 2 * 12  # each forward, and gradient checkpointing's second run of it
    expected = _expected_scores(trainer.model, [prompt for prompt, _ in pairs()])
    for score in seen[-1][1]:
        assert (expected - score).abs().amax(1).min() < 1e-5


def test_dpo_goes_on_from_an_adapter_against_a_copy_of_it(tmp_path):
    model = adapted()
    trainer = _trainer("DPO", tmp_path, _preferences(), model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".default")}
    trainer.train()
    assert _logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-3)
    after = dict(model.named_parameters())
    for name, before in start.items():
        torch.testing.assert_close(after[name.removesuffix("default") + "ref"], before, rtol=0, atol=0)
    assert any(not torch.equal(after[name], before) for name, before in start.items())
    torch.testing.assert_close(_prior(model, "ref").centroids, _prior(model).centroids, rtol=0, atol=0)


@pytest.mark.parametrize("start", ["fresh", "adapter"])
def test_grpo_trains_with_the_prior_that_it_generated_with(tmp_path, start):
    data = [{"prompt": text(prompt)} for prompt, _ in pairs()]
    model = adapted() if start == "adapter" else None
    trainer = _trainer(
        "GRPO",
        tmp_path,
        data,
        model,
        max_completion_length=4,
        num_generations=2,
        beta=0.1,
        max_steps=2,
        reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
    )
    seen = _watch(trainer.model)
    trainer.train()
    if start == "fresh":
        _check_fit(trainer.model, [prompt for prompt, _ in pairs()])
    else:  # the reference is a copy of the adapter, so that nothing lies between them at first
        assert _logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-5)
    expected = _expected_scores(trainer.model, [prompt for prompt, _ in pairs()])
    lengths = [x.shape[1] for x, _ in seen]
    assert 1 in lengths and max(lengths) > 7  # one-token steps of generation, and rows with their completions
    for _, scores in seen:
        assert (scores[:, None] - expected[None]).abs().amax(-1).amin(1).max() < 1e-5


def test_grpo_prompts_may_be_messages(tmp_path):
    data = [{"prompt": [{"role": "user", "content": text(prompt)}]} for prompt, _ in pairs()]
    reward = {"reward_funcs": lambda completions, **_: [1.0] * len(completions)}
    trainer = _trainer("GRPO", tmp_path, data, max_completion_length=2, num_generations=2, max_steps=1, **reward)
    trainer.train()
    _check_fit(trainer.model, [[3, *prompt, 4] for prompt, _ in pairs()])


def test_kto_fits_on_the_prompts(tmp_path):
    data = [
        {"prompt": text(prompt), "completion": " " + text(answer), "label": bool(index % 2)}
        for index, (prompt, answer) in enumerate(pairs())
    ]
    trainer = _trainer("KTO", tmp_path, data, max_steps=1)
    trainer.train()
    _check_fit(trainer.model, [prompt for prompt, _ in pairs()])


def test_a_reward_model_takes_the_whole_row_as_its_prompt(tmp_path):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(make_llama(num_labels=1).config)
    model = get_peft_model(base, TRexConfig(**{**SETTINGS, "task_type": "SEQ_CLS"}))
    data = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in _preferences()]
    trainer = _trainer("Reward", tmp_path, data, model, max_steps=12)
    trainer.train()
    losses = _logged(trainer)
    assert losses[-1] < 0.8 * losses[0]
    answers = [(prompt, ending) for prompt, answer in pairs() for ending in (answer, [*answer[::-1], 5])]
    _check_fit(model, [[*prompt, *ending, 2] for prompt, ending in answers])


def test_wrapped_packing_is_one_conversation_a_row(tmp_path):
    """It cuts rows anywhere and says nothing of where a sequence begins."""
    data = [{"prompt": text(prompt), "completion": " " + text(answer)} for prompt, answer in pairs()]
    mode = {"packing": True, "packing_strategy": "wrapped", "max_length": 20, "max_steps": 1}
    trainer = _trainer("SFT", tmp_path, data, adapted(), **mode)
    seen = _watch(trainer.model)
    with pytest.warns(UserWarning, match="Some rows hold several answers"):
        trainer.train()
    for _, scores in seen:
        assert scores.shape == (4, 20, 4)
        # Each answer has the prior of all that stands before it in the row.
        assert all(len(row.unique(dim=0)) > 1 for row in scores)


UNUSED = "balance_loss_coef and router_z_loss_coef have no effect"


def _unused(kind, folder, trainer_class=None, **kwargs):
    """Trains one step with router losses: the adapter afterwards, and whether their having no effect was said."""
    data = {
        "SFT": lambda: [{"prompt": text(prompt), "completion": " " + text(answer)} for prompt, answer in pairs()],
        "DPO": _preferences,
        "GRPO": lambda: [{"prompt": text(prompt)} for prompt, _ in pairs()],
    }[kind]()
    if kind == "GRPO":
        kwargs["reward_funcs"] = lambda completions, **_: [float(len(completion)) for completion in completions]
        kwargs.update(max_completion_length=4, num_generations=2)
    model = adapted(balance_loss_coef=10.0)
    trainer = _trainer(kind, folder, data, model, max_steps=1, **kwargs)
    if trainer_class is not None:
        trainer.__class__ = trainer_class
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    routers = {name: p.detach().clone() for name, p in model.named_parameters() if "trex_router" in name}
    return routers, [str(warning.message) for warning in caught if UNUSED in str(warning.message)]


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_router_losses_that_a_trainer_passes_by_are_said_in_its_first_step(tmp_path, kind):
    _, said = _unused(kind, tmp_path)
    assert len(said) == 1 and f"Add the output's `{LOSS}`" in said[0]


def test_router_losses_reach_sft_by_the_advice(tmp_path):
    class Adding(trl.SFTTrainer):
        def compute_loss(self, model, *args, **kwargs):
            outputs = []
            hook = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            loss = super().compute_loss(model, *args, **kwargs)
            hook.remove()
            return loss + getattr(outputs[0], LOSS)

    (without, _), (routers, said) = _unused("SFT", tmp_path), _unused("SFT", tmp_path, Adding)
    assert not said
    assert any((routers[name] - without[name]).abs().max() > 1e-4 for name in routers)
