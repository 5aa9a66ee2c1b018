"""Tokenizers whose every token can be read, and texts for them: for tests that need more than token ids."""

from conftest import PAD, make_llama, prompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = """{% for message in messages %}{% if message['role'] == 'user' %}w3 {{ message['content'] }} w4 {% else %}\
{% generation %}{{ message['content'] }} </s>{% endgeneration %} {% endif %}{% endfor %}"""

# The template of SmolLM2 and Qwen, with tags around what an assistant writes.
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == \
'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}\
{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|im_start|>assistant\n' }}{% endif %}"""
SPECIAL = """<s> </s> <pad> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn>
<end_of_turn> [INST] [/INST] <|user|> <|assistant|> <|system|> <|end|> <think> </think> <m> </m>""".split()
# Whitespace of several lengths, and what follows sentences, are tokens of their own.
TEXTS = [
    "hello world.\n\nthe user is the assistant.\n\n  hello\n\n\nsystem\n   user\n\n\n\n  model Instruction:\n"
] * 5


def make_tokenizer():
    """One word a token: "w7" is token 7."""
    vocab = {"<pad>": PAD, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def make_chat_tokenizer(template=CHATML):
    """A small byte-level BPE, in which whitespace merges as in GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


def text(ids):
    return " ".join(f"w{i}" for i in ids)


def pairs(count=16):
    """Prompts of four to seven tokens, and the rest of the group's nine as their answer."""
    cuts = [4 + index % 4 for index in range(count)]
    return [(ids[:cut], ids[cut:]) for ids, cut in zip(prompts(count).tolist(), cuts, strict=True)]


def rows(count=6):
    return [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in pairs(count)]


def save_tiny_model(folder):
    """A Llama that reads bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    fast.save_pretrained(folder)
    make_llama(vocab_size=len(vocabulary), eos_token_id=2, max_position_embeddings=256).save_pretrained(folder)
