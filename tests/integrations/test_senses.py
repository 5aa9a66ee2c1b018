"""Models that see or hear: each trains on data that are made here, is saved, and loads again.

In each but the first a row says two things: what is in the picture or the sound, and which of two rules to answer by.
Only the prompt, or its embedding, tells the rule, so a low loss takes both the senses and the prior.
"""

import warnings

import pytest
import torch
from conftest import BEFORE_5
from peft import PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_trex import SemanticEmbedsCollator, TRexConfig, TRexPriorCallback, initialize_trex_prior
from peft_trex.prior.adapters import find_embedding

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
SMALL = {"r_a": 2, "r_b": 3, "num_clusters": 4}
EXTERNAL = {**SMALL, "prior_encoder": "external", "prior_dim": 6}
HEAD = {"exclude_modules": ["classifier"], "modules_to_save": ["classifier"]}
KINDS, RULES, ROWS = 3, 2, 48
# A model that knows the picture and not the rule is right in one of two rows; this is ln 2.
UNTOLD = 0.69
IMAGE, START, END = 63, 1, 2


def made(model_class, config):
    """A model whose weights are so large that frozen layers pass on what an adapter changes."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def vit():
    return made(ViTForImageClassification, ViTConfig(**VISION, num_labels=KINDS, hidden_dropout_prob=0.0))


def clip():
    special = {"pad_token_id": 0, "bos_token_id": START, "eos_token_id": END}
    text = {**SIZES, "vocab_size": 64, "max_position_embeddings": 32, **special}
    return made(CLIPModel, CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def llava():
    text = LlamaConfig(**SIZES, vocab_size=64, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)
    vision = CLIPVisionConfig(**VISION)
    return made(
        LlavaForConditionalGeneration,
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-1),
    )


def whisper():
    sides = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides.items()}
    special = {"pad_token_id": 0, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
    return made(
        WhisperForConditionalGeneration,
        WhisperConfig(
            **sizes, **special, vocab_size=64, d_model=32, num_mel_bins=8, max_source_positions=20,
            max_target_positions=16, suppress_tokens=None, begin_suppress_tokens=None, dropout=0.0,
        ),
    )  # fmt: skip


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KIND = torch.arange(ROWS) % KINDS
RULE = torch.arange(ROWS) // KINDS % RULES
ANSWER = (KIND + RULE) % KINDS
# What is seen or heard is one of three patterns with some noise, and what tells the rule one of two directions.
PIXELS = drawn(1, KINDS, 3, 8, 8)[KIND] + 0.02 * drawn(2, ROWS, 3, 8, 8)
SOUND = drawn(3, KINDS, 8, 40)[KIND] + 0.2 * drawn(4, ROWS, 8, 40)
EMBEDS = drawn(5, RULES, 6)[RULE] + 0.1 * drawn(6, ROWS, 6)
# A text of either rule has tokens of its own.
TEXTS = 4 + 20 * RULE[:, None] + torch.randint(0, 20, (ROWS, 6), generator=torch.Generator().manual_seed(7))


def train(model, batch, steps=60, rate=2e-2):
    """The losses before and after some steps of training on one batch."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return losses[0], losses[-1]


def outputs(model, batch):
    """All tensors that a forward says, by name."""
    with torch.no_grad():
        return {name: value for name, value in model(**batch).items() if isinstance(value, torch.Tensor)}


def check_saved(model, make, batch, folder):
    """The adapter that is saved and loaded computes the same bits, and the base model others."""
    before = outputs(model, batch)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(make(), folder).eval()
    after = outputs(loaded, batch)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    without = {name: value for name, value in batch.items() if name != "semantic_embeds"}
    with loaded.disable_adapter():
        base = outputs(loaded, without)
    assert any(not torch.equal(before[name], base[name]) for name in before)
    return loaded


def test_vit_without_a_prior(tmp_path):
    config = TRexConfig(**SMALL, **HEAD, use_prior=False)
    model = get_peft_model(vit(), config)
    batch = {"pixel_values": PIXELS, "labels": KIND}
    first, last = train(model, batch)
    assert first > 0.5 and last < 0.1
    assert model.base_model.prior_of("default") is None
    check_saved(model, vit, batch, tmp_path)
    # Without a word on the rule it cannot be told.
    _, untold = train(get_peft_model(vit(), config), {"pixel_values": PIXELS, "labels": ANSWER})
    assert untold > 0.9 * UNTOLD


def test_vit_with_embeddings_of_ones_own(tmp_path):
    """By the Trainer, whose callback fits the prior from the data's own column."""
    model = get_peft_model(vit(), TRexConfig(**EXTERNAL, **HEAD))
    rows = [
        {"pixel_values": pixels, "labels": label, "semantic_embeds": embeds}
        for pixels, label, embeds in zip(PIXELS, ANSWER, EMBEDS, strict=True)
    ]
    settings = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0}
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=80, learning_rate=2e-2, per_device_train_batch_size=16,
        remove_unused_columns=False, **settings,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[TRexPriorCallback(progress=False)]).train()
    assert model.base_model.prior_of("default").fitted
    # A model without token embeddings has no tower beside it: the prior reaches all layers.
    assert all(layer.trex_reached["default"] for _, layer in model.base_model.trex_layers())
    batch = {"pixel_values": PIXELS, "labels": ANSWER, "semantic_embeds": EMBEDS}
    model.eval()
    said = outputs(model, batch)
    assert said["loss"] < 0.5 * UNTOLD
    # The same pictures under the other rule.
    other = outputs(model, {**batch, "semantic_embeds": EMBEDS.roll(KINDS, 0)})["logits"]
    assert torch.equal(other.argmax(-1), (KIND + 1 - RULE) % KINDS)
    check_saved(model, vit, batch, tmp_path / "adapter")


@pytest.mark.skipif(BEFORE_5, reason="the towers of CLIP are no models of their own before transformers 5")
def test_clip(tmp_path):
    """It names no token embedding, and has one in its text tower: the prior is that of the text, and acts there."""
    model = get_peft_model(clip(), TRexConfig(**SMALL))
    # Each picture goes with a text of its kind; eight pairs, none of them twice.
    texts = torch.cat([4 + 7 * torch.arange(8)[:, None] + torch.arange(6), torch.full((8, 1), END)], 1)
    batch = {"input_ids": texts, "pixel_values": drawn(8, 8, 3, 8, 8), "return_loss": True}
    report = initialize_trex_prior(model, [{"input_ids": texts}], progress=False)
    assert report.prompts == 8 and report.chat_markers is None
    first, last = train(model, batch, 40)
    assert first > 1.5 and last < 0.3
    reached = {name: layer.trex_reached["default"] for name, layer in model.base_model.trex_layers()}
    assert reached == {name: name.startswith("text_model.") for name in reached}
    said, steered = outputs(model, batch), outputs(model, {**batch, "semantic_prior": 1})
    assert torch.equal(said["image_embeds"], steered["image_embeds"])
    assert (said["text_embeds"] - steered["text_embeds"]).abs().max() > 1e-3
    loaded = check_saved(model, clip, batch, tmp_path)
    features = loaded.get_base_model().get_text_features(input_ids=texts)
    features = torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)
    torch.testing.assert_close(features, said["text_embeds"], rtol=1e-4, atol=1e-5)


def image_prompts(texts):
    """Prompts of four places for a picture and a text."""
    return torch.cat([torch.full((len(texts), 4), IMAGE), texts], 1)


def test_llava(tmp_path):
    """T-REX in the text model and in the tower: the prior is that of the prompt, and the tower sees none."""
    model = get_peft_model(llava(), TRexConfig(**SMALL, task_type="CAUSAL_LM"))
    prompts = image_prompts(TEXTS)
    ids = torch.cat([prompts, 50 + ANSWER[:, None]], 1)
    batch = {"input_ids": ids, "pixel_values": PIXELS, "labels": ids.masked_fill(torch.arange(11) < 10, -100)}
    initialize_trex_prior(model, [batch], progress=False)
    reached = {name: layer.trex_reached["default"] for name, layer in model.base_model.trex_layers()}
    assert reached == {name: "language_model" in name for name in reached} and len(reached) > 14
    first, last = train(model, batch, 80, rate=1e-2)
    assert first > 2 and last < 0.6 * UNTOLD
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    assert all(any(part in name for name in trained) for part in ("language_model", "vision_tower", "projector"))
    loaded = check_saved(model, llava, batch, tmp_path)
    tokens = loaded.generate(input_ids=prompts, pixel_values=PIXELS, max_new_tokens=1, do_sample=False)
    assert torch.equal(tokens[:, -1], 50 + ANSWER)
    # The same pictures with a text of the other rule.
    other = image_prompts(TEXTS.roll(KINDS, 0))
    tokens = loaded.generate(input_ids=other, pixel_values=PIXELS, max_new_tokens=1, do_sample=False)
    assert (tokens[:, -1] == 50 + (KIND + 1 - RULE) % KINDS).float().mean() > 0.9


TRANSCRIPTS = torch.stack([10 + ANSWER, 20 + ANSWER, torch.full((ROWS,), END)], 1)


# Without a task_type PEFT passes on what it is given; with it, arguments that Whisper does not name.
@pytest.mark.parametrize("task", [None, "SEQ_2_SEQ_LM"])
def test_whisper_with_embeddings_of_ones_own(tmp_path, task):
    model = get_peft_model(whisper(), TRexConfig(**EXTERNAL, task_type=task))
    initialize_trex_prior(model, embeddings=EMBEDS, progress=False)
    assert all(layer.trex_reached["default"] for _, layer in model.base_model.trex_layers())
    batch = {"input_features": SOUND, "labels": TRANSCRIPTS, "semantic_embeds": EMBEDS}
    first, last = train(model, batch)
    assert first > 2 and last < 0.25 * UNTOLD
    loaded = check_saved(model, whisper, batch, tmp_path)
    settings = {"max_new_tokens": 3, "do_sample": False, "semantic_embeds": EMBEDS}
    tokens = loaded.generate(input_features=SOUND, **settings)
    # Releases differ in which special tokens they return.
    assert torch.equal(tokens[tokens > END].view(ROWS, 2), TRANSCRIPTS[:, :2])
    # The sound may come without its name.
    assert torch.equal(loaded.get_base_model().generate(SOUND, **settings), tokens)


def test_whisper_without_a_prior(tmp_path):
    model = get_peft_model(whisper(), TRexConfig(**SMALL, use_prior=False))
    batch = {"input_features": SOUND, "labels": TRANSCRIPTS.where(TRANSCRIPTS == END, TRANSCRIPTS - ANSWER[:, None])}
    batch["labels"][:, 0] += KIND
    first, last = train(model, batch)
    assert first > 2 and last < 0.2
    check_saved(model, whisper, batch, tmp_path)


def test_a_recording_that_whisper_cuts_has_its_prior_in_each_piece():
    """A long recording is transcribed piece by piece, and rows that have ended leave the batch."""
    model = get_peft_model(whisper(), TRexConfig(**EXTERNAL, init_weights=False))
    initialize_trex_prior(model, embeddings=EMBEDS, progress=False)
    model.generation_config.no_timestamps_token_id = 40
    seen, layer = [], next(layer for _, layer in model.base_model.trex_layers())
    layer.register_forward_pre_hook(lambda layer, args: seen.append(layer._channel.scores("default", args[0])))

    def transcribe(lengths, rules):
        sound = torch.cat([SOUND, SOUND.roll(1, 0), SOUND.roll(2, 0)], 2)[: len(lengths)]
        mask = (torch.arange(120) < torch.tensor(lengths)[:, None]).long()
        settings = {"return_timestamps": True, "max_new_tokens": 4, "attention_mask": mask}
        model.generate(input_features=sound, semantic_embeds=EMBEDS[[KINDS * rule for rule in rules]], **settings)

    for rule in range(RULES):
        transcribe([120], [rule])
    first, second = seen[0], seen[-1]
    assert len(seen) >= 4 and not torch.allclose(first, second)
    assert all(torch.equal(scores, first) or torch.equal(scores, second) for scores in seen)
    with pytest.raises(ValueError, match=r"with 1 rows, .* for 2 prompts.*one row at a time"):
        transcribe([30, 120], [0, 1])


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_an_adapter_loads_where_the_model_names_no_embedding(tmp_path, task):
    model = get_peft_model(clip(), TRexConfig(**SMALL, use_prior=False, init_weights=False, task_type=task))
    check_saved(model, clip, {"input_ids": TEXTS, "pixel_values": PIXELS, "return_loss": True}, tmp_path)


class Towers(PreTrainedModel):
    """A model of several parts that names no embedding of its own."""

    config_class = BertConfig

    def __init__(self, config, count):
        super().__init__(config)
        self.parts = torch.nn.ModuleList(BertModel(config) for _ in range(count))

    def forward(self, input_ids):
        return [part(input_ids) for part in self.parts]


def test_an_embedding_is_taken_only_where_it_must_be_the_prompts():
    config = BertConfig(**SIZES, vocab_size=64)
    one, two = Towers(config, 1), Towers(config, 2)
    with pytest.raises(NotImplementedError):
        one.get_input_embeddings()
    assert find_embedding(one) is one.parts[0].embeddings.word_embeddings
    assert find_embedding(two) is None
    # The embedding of an encoder-decoder that names none may be the decoder's.
    one.config.is_encoder_decoder = True
    assert find_embedding(one) is None


def test_what_a_user_reads():
    """Each error and warning on these roads says what to do."""
    pixels, sound = {"pixel_values": PIXELS[:2]}, {"input_features": SOUND[:2], "labels": TRANSCRIPTS[:2]}
    for make, batch in ((vit, pixels), (whisper, sound)):
        model = get_peft_model(make(), TRexConfig(**SMALL))
        said = "names no token embedding of its prompts"
        with pytest.warns(UserWarning, match=rf"{said} .*use_prior=False.*prior_encoder='external'"):
            model(**batch)
        with pytest.raises(ValueError, match=rf"{said} .*prior_encoder='external'.*use_prior=False"):
            initialize_trex_prior(model, [batch], progress=False)
        model = get_peft_model(make(), TRexConfig(**EXTERNAL))
        initialize_trex_prior(model, embeddings=EMBEDS, progress=False)
        with pytest.raises(ValueError, match=r"semantic_embeds is missing.*remove_unused_columns=False"):
            model(**batch)
        with pytest.raises(ValueError, match=r"keep semantic_embeds as a column .*remove_unused_columns=False"):
            SemanticEmbedsCollator(dict, lambda texts: EMBEDS, object())(batch)


def test_nothing_is_warned_of_where_all_is_right():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft_trex")
        model = get_peft_model(whisper(), TRexConfig(**EXTERNAL))
        initialize_trex_prior(model, embeddings=EMBEDS, progress=False)
        model(input_features=SOUND, labels=TRANSCRIPTS, semantic_embeds=EMBEDS)
