"""The middleware in front of a server that is no server: which adapter it asks for, and what it leaves alone."""

import asyncio
import gzip
import json
import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from conftest import VOCAB, adapted, prompts
from texts import make_tokenizer, text

from peft_trex import calibrate_trex_merge, initialize_trex_prior, save_trex_as_lora
from peft_trex.serve_router import Routing, TRexMiddleware
from peft_trex.serve_router.routing import LoraList, ModelName

# The chat template of texts.py writes a user's message between w3 and w4.
MARKERS = {"before": [3], "after": [4], "assistant": []}
COMPLETIONS, CHAT, RESPONSES, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"
TOOL = {"type": "function", "function": {"name": "w5", "description": "w6", "parameters": {}}}
# Writes tools into the user's message, as Llama 3.1's template does.
TOOLS_INSIDE = """{% for message in messages %}w3 {% if tools %}{% for tool in tools %}{{ tool.function.name }} \
{% endfor %}{% endif %}{{ message['content'] }} w4 {% endfor %}"""


def messages_of(count, seed=0):
    """Rows of token ids, each of one of four tasks, without the markers' ids."""
    return prompts(count, length=6, seed=seed).clamp(min=5).tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The exports of an adapter with chat markers and of one without, and the tokenizer of both."""
    root = tmp_path_factory.mktemp("exports")
    make_tokenizer().save_pretrained(root / "tokenizer")
    for name, markers in (("chat", MARKERS), ("whole", None)):
        model = adapted(fit=False, chat_markers=markers)
        ids = torch.tensor([[3, *row, 4] for row in messages_of(32)])
        initialize_trex_prior(model, [{"input_ids": ids}], progress=False)
        calibrate_trex_merge(model, [{"input_ids": ids[:8]}], per_cluster=True, progress=False)
        save_trex_as_lora(model, root / name, base_model=str(root / "tokenizer"))
    return root


@pytest.fixture(scope="module")
def chat(folders):
    return Routing(folders / "chat", target=ModelName("base:{}"), max_bytes=20_000)


@pytest.fixture(scope="module")
def whole(folders):
    return Routing(folders / "whole")


class Server:
    """Knows the models base:cluster_00, ..., and remembers what reached it."""

    def __init__(self):
        self.scopes, self.bodies = [], []

    async def __call__(self, scope, receive, send):
        content, more = b"", True
        while more:
            message = await receive()
            content, more = content + message.get("body", b""), message.get("more_body", False)
        self.scopes.append(scope)
        self.bodies.append(content)
        status, answer = 200, {"object": "list", "data": [{"id": "base"}]}
        if scope["method"] == "POST":
            try:
                answer = {"echo": json.loads(content)}
                status = 200 if answer["echo"]["model"].startswith("base:") else 404
            except Exception:
                status, answer = 400, {"error": "the server's own"}
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode(), "more_body": False})


async def ask(app, path, body, method="POST", headers=(), pieces=1):
    """Send a request whose body comes in pieces; the answer's status, headers and body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = max(1, -(-len(content) // pieces))
    parts = [content[start : start + size] for start in range(0, len(content), size)] or [b""]
    waiting = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1} for index, part in enumerate(parts)
    ]
    sent = []

    async def receive():
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], dict(sent[0]["headers"]), content


def answer(routing, path, body, **options):
    """What a request to a new server gets, and that server."""
    server = Server()
    return asyncio.run(ask(TRexMiddleware(server, routing), path, body, **options)), server


def requests_of(row, other):
    """One prompt in all the forms that a server takes, with another task's tokens around it, which must not count."""
    words, user = text(row), {"role": "user", "content": text(row)}
    system, turn = {"role": "system", "content": text(other)}, {"role": "user", "content": text(other)}
    said = {"role": "assistant", "content": text(other)}
    parts = {"role": "user", "content": [{"type": "text", "text": text(row[:2])}, text(row[2:])]}
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": words}]}
    call = {"type": "function_call", "call_id": "1", "name": "w5", "arguments": "{}"}
    called = {"type": "function_call_output", "call_id": "1", "output": "w7"}
    written = f"{text(other)} w3 {words} w4"
    ids = [*other, 3, *row, 4]
    return {
        "text": (COMPLETIONS, {"prompt": written}),
        "texts": (COMPLETIONS, {"prompt": [written, f"w3 {words} w4"]}),
        "ids": (COMPLETIONS, {"prompt": ids}),
        "lists of ids": (COMPLETIONS, {"prompt": [ids, ids[6:]]}),
        "chat": (CHAT, {"messages": [user], "stream": True}),
        "chat with a system prompt": (CHAT, {"messages": [system, user], "temperature": 0.5}),
        "chat of turns": (CHAT, {"messages": [turn, said, user]}),
        "chat in parts": (CHAT, {"messages": [parts]}),
        "chat with tools": (CHAT, {"messages": [user], "tools": [TOOL], "reasoning_effort": "low"}),
        "chat with a template's options": (CHAT, {"messages": [user], "chat_template_kwargs": {"color": "red"}}),
        "response": (RESPONSES, {"input": words}),
        "response to instructions": (RESPONSES, {"input": words, "instructions": text(other)}),
        "response to items": (RESPONSES, {"input": [turn, said, item]}),
        "response to a tool": (RESPONSES, {"input": [item, call, called], "tools": [TOOL["function"]]}),
        "response to a response": (RESPONSES, {"input": [item], "previous_response_id": "resp_1"}),
        "tokenize": (TOKENIZE, {"prompt": written}),
        "tokenize a chat": (TOKENIZE, {"messages": [system, user]}),
    }


@pytest.mark.parametrize("form", requests_of([5], [6]))
def test_each_form_of_a_request_gets_the_adapter_of_its_cluster(chat, form):
    # The expectation is written by hand: the marker, the message, the marker.
    routes = [(row, chat.router.route([3, *row, 4]).adapter) for row in messages_of(12, seed=1)]
    adapters = set()
    for row, expected in routes:
        other = next(row for row, adapter in routes if adapter != expected)
        path, body = requests_of(row, other)[form]
        (status, headers, content), server = answer(chat, path, {"model": "trex", **body, "user": "one"}, pieces=3)
        assert status == 200 and headers[b"x-trex-adapter"] == expected.encode() and headers[b"x-own"] == b"1"
        # All but the model's name reaches the server as it was, and with the right length.
        assert json.loads(content)["echo"] == {"model": f"base:{expected}", **body, "user": "one"}
        assert dict(server.scopes[0]["headers"])[b"content-length"] == str(len(server.bodies[0])).encode()
        adapters.add(expected)
    assert len(adapters) > 2


def test_without_markers_the_whole_prompt_counts(whole):
    counted = []
    for row, other in zip(messages_of(6, seed=2), messages_of(6, seed=3)[::-1], strict=True):
        messages = [{"role": "system", "content": text(other)}, {"role": "user", "content": text(row)}]
        # The template leaves the system's role out of the markers, and ends it as an answer.
        expected = whole.router.route([*other, 2, 3, *row, 4]).adapter
        for path, body in (
            (CHAT, {"messages": messages}),
            (RESPONSES, {"input": text(row), "instructions": text(other)}),
            (COMPLETIONS, {"prompt": f"{text(other)} </s> w3 {text(row)} w4"}),
        ):
            (_, headers, _), _ = answer(whole, path, {"model": "trex", **body})
            assert headers[b"x-trex-adapter"] == expected.encode()
        counted.append(expected != whole.router.route([3, *row, 4]).adapter)
    assert any(counted)


def test_prompts_of_several_clusters_in_one_request_are_refused(chat):
    rows = messages_of(4)
    names = sorted({chat.router.route([3, *row, 4]).adapter for row in rows})
    assert len(names) > 1
    for prompt in ([[3, *row, 4] for row in rows], [f"w3 {text(row)} w4" for row in rows]):
        (status, _, content), server = answer(chat, COMPLETIONS, {"model": "trex", "prompt": prompt})
        error = json.loads(content)["error"]
        assert status == error["code"] == 400 and not server.bodies
        assert f"its 4 prompts belong to the adapters {', '.join(names)}" in error["message"]
        assert "one request for each prompt" in error["message"]


USER = [{"role": "user", "content": "w5 w6"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]
REFUSED = {
    "embeddings": (COMPLETIONS, {"prompt_embeds": "AAAA"}, "prompt_embeds has none"),
    "truncation": (COMPLETIONS, {"prompt": "w5", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens cuts"),
    "another vocabulary": (COMPLETIONS, {"prompt": [5, VOCAB]}, rf"holds {VOCAB} at position 1; .* in \[0, {VOCAB}\)"),
    "negative": (COMPLETIONS, {"prompt": [-1]}, "holds -1 at position 0"),
    "no number of a machine": (COMPLETIONS, {"prompt": [10**30]}, "dtype object"),
    "half a character": (COMPLETIONS, {"prompt": "\ud800"}, "tokenizer cannot read the prompt"),
    "template of its own": (CHAT, {"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template in a request is not"),
    "template as an option": (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"chat_template": "{{ 1 }}", "tokenize": True}},
        "chat_template_kwargs holds chat_template, tokenize",
    ),
    "image": (CHAT, {"messages": [{"role": "user", "content": IMAGE}]}, "content of type 'image_url'"),
    "arguments": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "arguments of a tool's call are no JSON",
    ),
    "message elsewhere": (
        RESPONSES,
        {"input": [{"type": "function_call_output", "output": "w5"}], "previous_response_id": "resp_1"},
        "stands in an earlier response, which only the server has",
    ),
    "other item": (RESPONSES, {"input": [{"type": "computer_call"}]}, "input of type 'computer_call'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_routed_rightly_is_refused_by_name(chat, case):
    path, body, words = REFUSED[case]
    (status, headers, content), server = answer(chat, path, {"model": "trex", **body})
    assert status == 400 and b"x-trex-adapter" not in headers and not server.bodies
    message = json.loads(content)["error"]["message"]
    assert message.startswith("T-REX cannot route this request: ")
    assert re.search(words, message)


def test_what_only_the_server_can_write_is_refused_where_it_counts(whole, chat, folders, tmp_path):
    (tmp_path / "template").write_text(TOOLS_INSIDE)
    inside = Routing(folders / "chat", chat_template=tmp_path / "template")
    body = {"model": "trex", "messages": USER}
    for routing in (inside, whole):
        assert answer(routing, CHAT, body)[0][1][b"x-trex-adapter"]
    (status, _, content), _ = answer(inside, CHAT, {**body, "tools": [TOOL]})
    assert status == 400 and b"tools would count in the choice" in content
    # texts.py's template shows no tools, so they count nowhere.
    assert answer(whole, CHAT, {**body, "tools": [TOOL]})[0][1][b"x-trex-adapter"]
    for more in ({"previous_response_id": "resp_1"}, {"input": [*USER, {"role": "assistant", "content": "w5"}]}):
        (status, _, content), _ = answer(whole, RESPONSES, {"model": "trex", "input": USER, **more})
        assert status == 400 and b"for an adapter without chat_markers" in content
        assert answer(chat, RESPONSES, {"model": "trex", "input": USER, **more})[0][0] == 200
    (tmp_path / "template").write_text("{{ raise_exception('roles must alternate') }}")
    (status, _, content), _ = answer(Routing(folders / "chat", chat_template=tmp_path / "template"), CHAT, body)
    assert status == 400 and b"cannot write these messages (roles must alternate)" in content


def deep(count):
    return b'{"model": "trex", "prompt": ' + b"[" * count + b"]" * count + b"}"


OF_NO_FORM = {
    "no JSON": b'{"model": "trex", "prompt": "w5"',
    "empty": b"",
    "no object": b'["trex"]',
    "Latin-1": '{"model": "trex", "prompt": "é"}'.encode("latin-1"),
    "compressed": gzip.compress(b'{"model": "trex", "prompt": "w5"}'),
    "deep": deep(100_000)[:19_000] + b"x",
    "deep and whole": deep(9_000),
    "a number of many digits": b'{"model": "trex", "prompt": [' + b"9" * 5_000 + b"]}",
    "no prompt": b'{"model": "trex"}',
    "prompt of another type": b'{"model": "trex", "prompt": {"text": "w5"}}',
    "no prompts": b'{"model": "trex", "prompt": []}',
    "mixed prompts": b'{"model": "trex", "prompt": ["w5", 5]}',
    "true is no number": b'{"model": "trex", "prompt": [true]}',
    "no flag": b'{"model": "trex", "prompt": "w5", "add_special_tokens": "yes"}',
    "too long": json.dumps({"model": "trex", "prompt": "w5 " * 10_000}).encode(),
}
OF_NO_FORM_IN_CHATS = {
    "no messages": {},
    "messages of another type": {"messages": "w5"},
    "message of another type": {"messages": ["w5"]},
    "no role": {"messages": [{"content": "w5"}]},
    "content of another type": {"messages": [{"role": "user", "content": {"text": "w5"}}]},
    "part of another type": {"messages": [{"role": "user", "content": [5]}]},
    "text of another type": {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
    "calls of another type": {"messages": [{"role": "assistant", "tool_calls": "w5"}]},
    "tools of another type": {"messages": USER, "tools": "w5"},
    "options of another type": {"messages": USER, "chat_template_kwargs": "w5"},
}
HOSTILE = {name: (COMPLETIONS, content) for name, content in OF_NO_FORM.items()}
HOSTILE |= {name: (CHAT, json.dumps({"model": "trex", **body}).encode()) for name, body in OF_NO_FORM_IN_CHATS.items()}
HOSTILE["no input"] = (RESPONSES, b'{"model": "trex", "input": 5}')
HOSTILE["instructions of another type"] = (RESPONSES, b'{"model": "trex", "input": "w5", "instructions": 5}')


@pytest.mark.parametrize("case", HOSTILE)
def test_a_body_of_no_form_reaches_the_server_as_it_is(chat, case):
    """The server then says in its own words what is wrong; at the least it has no model "trex"."""
    path, content = HOSTILE[case]
    headers = [(b"content-length", str(len(content)).encode()), (b"content-encoding", b"x")]
    ours, server = answer(chat, path, content, headers=headers, pieces=4)
    assert server.bodies == [content] and server.scopes[0]["headers"] == headers
    assert ours[0] in (400, 404) and ours == asyncio.run(ask(Server(), path, content, headers=headers))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_server_that_ignores_names_never_sees_a_body_of_no_form(folders, case):
    routing = Routing(folders / "chat", target=LoraList({}), max_bytes=20_000)
    path, content = HOSTILE[case]
    (status, _, content), server = answer(routing, path, content)
    reason = b"it is longer than 20000 bytes" if case == "too long" else b"its body has not the form"
    assert status == 400 and not server.bodies and b"T-REX cannot route this request: " + reason in content


def test_other_encodings_of_json_are_read(chat):
    row = messages_of(1)[0]
    body = {"model": "trex", "prompt": f"w3 {text(row)} w4", "user": "é\ud800", "seed": 10**25, "top_p": 1e400}
    for encoding in ("utf-8", "utf-16", "utf-32-le"):
        content = json.dumps(body, ensure_ascii=encoding != "utf-8").replace("\ud800", "\\ud800").encode(encoding)
        (status, headers, _), server = answer(chat, COMPLETIONS, content)
        adapter = chat.router.route([3, *row, 4]).adapter
        assert status == 200 and headers[b"x-trex-adapter"] == adapter.encode()
        assert json.loads(server.bodies[0]) == {**body, "model": f"base:{adapter}"}


def test_no_more_of_a_long_body_is_kept_than_the_bound(chat):
    read, passed = [], []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": b"x" * 1_000, "more_body": len(read) < 500}

    async def app(scope, receive, send):
        passed.append(len(read))
        while (await receive())["more_body"]:
            pass

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}
    asyncio.run(TRexMiddleware(app, chat)(scope, receive, None))
    # 20,000 bytes are the bound; the piece that goes beyond it is the last that is waited for.
    assert passed == [21] and len(read) == 500


def test_all_else_passes_untouched(chat):
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    async def receive():
        raise AssertionError("nothing may be read")

    async def send(message):
        raise AssertionError("nothing may be sent")

    middleware = TRexMiddleware(app, chat)
    scopes = [
        {"type": "lifespan"},
        {"type": "websocket", "path": COMPLETIONS},
        {"type": "http", "method": "GET", "path": COMPLETIONS, "headers": []},
        {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": []},
        {"type": "http", "method": "POST", "path": "/v1/models", "headers": []},
    ]
    for scope in scopes:
        asyncio.run(middleware(scope, receive, send))
        assert seen.pop() == (scope, receive, send)
    for body in ({"model": "base:cluster_00", "prompt": "w5"}, {"prompt": "w5"}, {"model": ["trex"], "prompt": "w5"}):
        content = json.dumps(body, indent=3).encode()
        (_, headers, _), server = answer(chat, COMPLETIONS, content)
        assert server.bodies == [content] and b"x-trex-adapter" not in headers


def test_a_root_path_is_no_part_of_the_route(chat):
    server, sent = Server(), []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b'{"model": "trex", "prompt": [5]}', "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/api/v1/completions", "root_path": "/api", "headers": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.run(TRexMiddleware(server, chat)(scope, receive, send))
    assert b"x-trex-adapter" in dict(sent[0]["headers"])


def test_the_list_of_models_has_one_more(chat):
    (status, headers, content), _ = answer(chat, "/v1/models", b"", method="GET")
    listed = json.loads(content)
    assert status == 200 and headers[b"x-own"] == b"1" and headers[b"content-length"] == str(len(content)).encode()
    assert [model["id"] for model in listed["data"]] == ["base", "trex"]
    assert listed["data"][1]["object"] == "model" and isinstance(listed["data"][1]["created"], int)

    async def no_list(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"[", "more_body": True})
        await send({"type": "http.response.body", "body": b"]"})

    app = TRexMiddleware(no_list, chat)
    assert asyncio.run(ask(app, "/v1/models", b"", method="GET")) == (401, {b"content-length": b"2"}, b"[]")


def test_an_answer_streams(chat):
    """Each piece leaves before the server makes the next one, and a client that goes away is seen by the server."""
    got, seen = [], []

    async def run():
        arrived, body = asyncio.Event(), [{"type": "http.request", "body": b'{"model": "trex", "prompt": [3, 5, 4]}'}]

        async def receive():
            return body.pop() if body else {"type": "http.disconnect"}

        async def send(message):
            got.append(message)
            arrived.set()

        async def app(scope, receive, send):
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for piece in (b"data: 1\n\n", b"data: 2\n\n"):
                arrived.clear()
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.wait_for(arrived.wait(), 30)
            seen.append(await receive())

        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}
        await TRexMiddleware(app, chat)(scope, receive, send)

    asyncio.run(run())
    assert [message.get("body") for message in got] == [None, b"data: 1\n\n", b"data: 2\n\n"]
    assert seen == [{"type": "http.disconnect"}]


def test_of_500_requests_at_once_none_is_misrouted(chat):
    rows = messages_of(500, seed=4)
    forms = list(requests_of([5], [6]))

    async def run():
        app = TRexMiddleware(Server(), chat)
        asked = []
        for index, row in enumerate(rows):
            path, body = requests_of(row, rows[index - 1])[forms[index % len(forms)]]
            asked.append(ask(app, path, {"model": "trex", **body, "user": str(index)}, pieces=2))
        return await asyncio.gather(*asked)

    adapters = set()
    for index, (status, headers, content) in enumerate(asyncio.run(run())):
        expected = chat.router.route([3, *rows[index], 4]).adapter
        echo = json.loads(content)["echo"]
        assert status == 200 and echo["user"] == str(index) and echo["model"] == f"base:{expected}"
        assert headers[b"x-trex-adapter"] == expected.encode()
        adapters.add(expected)
    assert len(adapters) == 4


def test_the_environment_says_which_folder(folders, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="TREX_FOLDER is not set"):
        TRexMiddleware(Server())
    (tmp_path / "template").write_text("w3 w60 w60 w4")
    for name, value in {
        "FOLDER": folders / "chat",
        "MODEL": "mine",
        "TOKENIZER": folders / "tokenizer",
        "CHAT_TEMPLATE": tmp_path / "template",
        "ADAPTER_NAMES": "base:{}",
        "MAX_BYTES": "123",
    }.items():
        monkeypatch.setenv(f"TREX_{name}", str(value))
    middleware = TRexMiddleware(Server())
    assert (middleware.routing.name, middleware.routing.max_bytes) == ("mine", 123)
    status, headers, _ = asyncio.run(ask(middleware, CHAT, {"model": "mine", "messages": USER}))
    assert (
        status == 200
        and headers[b"x-trex-adapter"].decode() == middleware.routing.router.route([3, 60, 60, 4]).adapter
    )
    with pytest.raises(ValueError, match=r"expected one \{\}, as in 'BASE:\{\}'"):
        ModelName("base")


def test_folders_that_no_server_can_route_by(folders, tmp_path):
    model = adapted(fit=False, prior_encoder="external", prior_dim=5)
    initialize_trex_prior(model, embeddings=torch.randn(40, 5), progress=False)
    calibrate_trex_merge(model, [{"input_ids": prompts(4), "semantic_embeds": torch.eye(4, 5)}], per_cluster=True)
    save_trex_as_lora(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"a prompt's tokens alone, which .*out cannot route by: .*'external'"):
        Routing(tmp_path / "out")
    model = adapted()
    calibrate_trex_merge(model, [{"input_ids": prompts(4)}], per_cluster=True, progress=False)
    save_trex_as_lora(model, tmp_path / "nameless")
    with pytest.raises(ValueError, match="nameless does not name its base model"):
        Routing(tmp_path / "nameless")
    with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere"):
        Routing(tmp_path / "nowhere", tokenizer=folders / "tokenizer")


WITHOUT = textwrap.dedent("""
    import asyncio, json, sys
    from importlib.machinery import PathFinder

    class Hidden(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            hidden = name.partition(".")[0] in ("torch", "peft", "accelerate", "sklearn", "httpx", "uvicorn")
            return None if hidden else super().find_spec(name, path, target)

    sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]
    from peft_trex.serve_router import TRexMiddleware

    async def server(scope, receive, send):
        print(json.loads((await receive())["body"])["model"])

    async def receive():
        return {"type": "http.request", "body": sys.argv[1].encode(), "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(TRexMiddleware(server)(scope, receive, None))
    import peft_trex
    print(peft_trex.SemanticRouter.__name__, peft_trex.__version__ == "0" or "torch" in sys.modules)
    try:
        from peft_trex import TRexConfig
    except ImportError as error:
        print(error)
    print(hasattr(peft_trex, "nothing"))
""")


def test_a_server_needs_neither_torch_nor_peft(chat, folders, monkeypatch):
    monkeypatch.setenv("TREX_FOLDER", str(folders / "chat"))
    row = messages_of(3)[2]
    body = json.dumps({"model": "trex", "messages": [{"role": "user", "content": text(row)}]})
    done = subprocess.run([sys.executable, "-c", WITHOUT, body], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    asked_for, found, missing, nothing = done.stdout.splitlines()
    assert asked_for == chat.router.route([3, *row, 4]).adapter
    assert found == "SemanticRouter False" and nothing == "False"
    assert missing.startswith("peft_trex.TRexConfig needs peft, which is not installed here: pip install peft-trex.")
