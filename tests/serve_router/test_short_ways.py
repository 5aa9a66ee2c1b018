"""What the middleware leaves out to be quick: transformers' wrapper of a tokenizer, and a thread for a short body."""

import asyncio
import json
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file
from texts import make_chat_tokenizer, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_trex.serve_router import Routing, TRexMiddleware
from peft_trex.serve_router.middleware import AT_ONCE
from peft_trex.serve_router.prompts import PromptReader

COMPLETIONS = "/v1/completions"
TEXTS = [
    "",
    " ",
    "hello world.\n\nthe user is the assistant.",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<s>hello</s><|im_start|><think>  \n\n\n   <m>é\u0301\u200d👩‍👩‍👧 \x00 ",
    "<|im_start|>" * 5 + "a" * 3000,
]


def tokenizer_of(kind, folder):
    """Tokenizers as their files may be: with tokens around each text, or with padding and truncation."""
    tokenizer = make_chat_tokenizer() if kind != "words" else make_tokenizer()
    backend = tokenizer.backend_tokenizer
    if kind == "around":
        special = [("<s>", backend.token_to_id("<s>")), ("</s>", backend.token_to_id("</s>"))]
        backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    if kind == "cut":
        backend.enable_truncation(7)
        backend.enable_padding(length=9)
    tokenizer.split_special_tokens = kind == "split"
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["plain", "words", "around", "cut", "split"])
def test_the_ids_are_those_of_transformers(kind, tmp_path):
    reader = PromptReader(tokenizer_of(kind, tmp_path), None, None)
    asked = AutoTokenizer.from_pretrained(tmp_path)
    assert reader._backend is not None
    lengths = set()
    for text in TEXTS:
        for special in (True, False):
            found = reader.read(COMPLETIONS, {"prompt": text, "add_special_tokens": special})
            assert found == [asked(text, add_special_tokens=special)["input_ids"]], (text, special)
            lengths.add(len(found[0]))
    assert len(lengths) > 2


class Own(PreTrainedTokenizerFast):
    """Says one token more than the tokenizer beneath it."""

    def __call__(self, text, **options):
        return {"input_ids": [*super().__call__(text, **options)["input_ids"], 7]}


class OwnBelow(PreTrainedTokenizerFast):
    def _encode_plus(self, *args, **options):
        found = super()._encode_plus(*args, **options)
        found["input_ids"] = [*found["input_ids"], 7]
        return found


class Slow:
    """A tokenizer without one of the package tokenizers beneath it."""

    is_fast = False

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text] + [7] * add_special_tokens}

    # Those of transformers 4 have methods of its own, too.
    __call__.__module__ = "transformers.tokenization_utils"

    def apply_chat_template(self, conversation, chat_template=None, tokenize=False):
        raise ValueError("no template")


@pytest.mark.parametrize("kind", [Own, OwnBelow, Slow])
def test_a_tokenizer_that_makes_ids_of_its_own_is_asked_itself(kind):
    tokenizer = kind() if kind is Slow else kind(tokenizer_object=make_tokenizer().backend_tokenizer)
    ids = PromptReader(tokenizer, None, None).read(COMPLETIONS, {"prompt": "w5 w6"})[0]
    assert ids == tokenizer("w5 w6", add_special_tokens=True)["input_ids"] and ids[-1] == 7 and len(ids) > 2


@pytest.fixture
def routing(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    scores = np.stack([np.arange(64) % 2 == 0, np.arange(64) % 2 == 1], axis=1).astype(np.float32)
    tensors = {"centroids": np.eye(2, dtype=np.float32), "mean": np.zeros(2, np.float32), "token_scores": scores}
    save_file(tensors, tmp_path / "router.safetensors")
    names = ["even", "odd"]
    settings = {"version": 1, "prior_encoder": "input_embeddings", "default": "even", "clusters": names}
    settings |= {"adapters": {name: name for name in names}, "base_model_name_or_path": str(tmp_path)}
    (tmp_path / "router.json").write_text(json.dumps(settings))
    return Routing(tmp_path, adapters=False)


def test_a_short_body_is_read_at_once_but_never_beside_a_long_one(routing, monkeypatch):
    """A long body leaves the server's loop free; meanwhile nobody else uses the tokenizer."""
    chosen, choose = [], routing.choose
    begun, may_end, busy = threading.Event(), threading.Event(), threading.Lock()

    def watched(path, content):
        assert busy.acquire(blocking=False), "two at once"
        try:
            chosen.append((json.loads(content)["user"], threading.get_ident()))
            if chosen[-1][0] == "long":
                begun.set()
                assert may_end.wait(60)
            return choose(path, content)
        finally:
            busy.release()

    monkeypatch.setattr(routing, "choose", watched)
    adapters = {}

    async def server(scope, receive, send):
        body = json.loads((await receive())["body"])
        adapters[body["user"]] = body["model"]

    app = TRexMiddleware(server, routing)

    async def ask(user, prompt):
        content = json.dumps({"model": "trex", "prompt": prompt, "user": user}).encode()
        assert (len(content) > AT_ONCE) is (user == "long")

        async def receive():
            return {"type": "http.request", "body": content}

        await app({"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}, receive, None)

    async def run():
        await ask("before", "w5 w7")
        long = asyncio.create_task(ask("long", "w6 " * AT_ONCE))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        # Whoever waited for the long body is gone, and the last in the queue, but not the thread that reads it.
        meanwhile = asyncio.create_task(ask("meanwhile", "w5 w7"))
        await asyncio.sleep(0.01)
        gone = asyncio.create_task(ask("gone", "w5"))
        await asyncio.sleep(0.01)
        gone.cancel()
        long.cancel()
        await asyncio.gather(gone, long, return_exceptions=True)
        late = asyncio.create_task(ask("late", "w6"))
        await asyncio.sleep(0.01)
        assert not meanwhile.done() and not late.done()
        may_end.set()
        await asyncio.gather(meanwhile, late)
        await ask("after", "w6 w8")

    asyncio.run(run())
    here, places = threading.get_ident(), dict(chosen)
    assert [user for user, _ in chosen] == ["before", "long", "meanwhile", "late", "after"]
    assert {user for user, place in places.items() if place == here} == {"before", "after"}
    assert adapters == {"before": "odd", "meanwhile": "odd", "late": "even", "after": "even"}
