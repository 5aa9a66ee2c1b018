"""The proxy between real sockets on loopback: what it hands on, and what it does when either side goes away."""

import argparse
import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection

import numpy as np
import pytest
import uvicorn
from safetensors.numpy import save_file
from texts import make_tokenizer

from peft_trex.serve_router.__main__ import application, lora_ids
from peft_trex.serve_router.proxy import Proxy

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The router's files of an export with two clusters, the even tokens and the odd ones; w5 belongs to neither."""
    folder = tmp_path_factory.mktemp("export")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    scores = np.stack([np.arange(64) % 2 == 0, np.arange(64) % 2 == 1], axis=1).astype(np.float32)
    scores[5] = 0
    centroids = np.eye(2, dtype=np.float32)
    tensors = {"centroids": centroids, "mean": np.zeros(2, np.float32), "token_scores": scores}
    save_file(tensors, folder / "router.safetensors")
    names = ["cluster_00", "cluster_01"]
    settings = {"version": 1, "prior_encoder": "input_embeddings", "default": "overall", "clusters": names}
    settings["adapters"] = {"overall": ".", **{name: name for name in names}}
    settings["base_model_name_or_path"] = str(folder / "tokenizer")
    (folder / "router.json").write_text(json.dumps(settings))
    return folder


@contextmanager
def running(app):
    """An ASGI application on a free port; its HOST:PORT."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Upstream:
    """Answers with what it was asked, or with the adapters of llama.cpp's server."""

    def __init__(self):
        self.first_arrived, self.client_gone = threading.Event(), threading.Event()

    async def __call__(self, scope, receive, send):
        content, more = b"", True
        while more:
            message = await receive()
            content, more = content + message.get("body", b""), message.get("more_body", False)
        headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
        answer = {"path": scope["raw_path"].decode(), "query": scope["query_string"].decode(), "headers": headers}
        answer["body"] = content.decode("latin-1")
        if scope["path"] == "/lora-adapters":
            names = ["overall", "cluster_00", "cluster_01"]
            answer = [{"id": index, "path": f"/loras/{name}.gguf", "scale": 0} for index, name in enumerate(names)]
        start = {"type": "http.response.start", "status": 203, "headers": [(b"x-two", b"1"), (b"x-two", b"2")]}
        await send(start)
        if scope["path"] == "/slow":
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            # A client that got nothing yet would never set this.
            while not self.first_arrived.is_set():
                await asyncio.sleep(0.01)
            while (await receive())["type"] != "http.disconnect":
                pass
            return self.client_gone.set()
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


def ask(server, method, path, body=None, headers=()):
    connection = HTTPConnection(server, timeout=60)
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


@pytest.fixture(scope="module")
def upstream():
    app = Upstream()
    with running(app) as server:
        yield app, server


def options(folder, server, **changed):
    found = {"folder": folder, "upstream": f"http://{server}", "name": "trex", "tokenizer": None, "max_bytes": 1_000}
    found |= {"chat_template": None, "adapter_names": "{}", "llama_cpp": False, **changed}
    return argparse.Namespace(**found)


def test_a_request_reaches_the_server_with_its_adapter(folder, upstream):
    with running(application(options(folder, upstream[1], adapter_names="BASE:{}"))) as server:
        for prompt, adapter in (("w6 w8 w7", "cluster_00"), ([7, 9], "cluster_01"), ("w5", "overall")):
            body = json.dumps({"model": "trex", "prompt": prompt})
            response, content = ask(server, "POST", f"{COMPLETIONS}?a=1", body, {"Authorization": "Bearer one"})
            assert response.status == 203 and response.getheader("x-trex-adapter") == adapter
            answer = json.loads(content)
            assert json.loads(answer["body"]) == {"model": f"BASE:{adapter}", "prompt": prompt}
            assert (answer["path"], answer["query"]) == (COMPLETIONS, "a=1")
            assert dict(answer["headers"])["authorization"] == "Bearer one"
            assert dict(answer["headers"])["host"] == upstream[1]


def test_all_else_passes_as_it_is(folder, upstream):
    with running(application(options(folder, upstream[1] + "/"))) as server:
        response, content = ask(server, "GET", "/a%2Fb%20c?x=%20&y", headers={"X-One": "1", "Connection": "close"})
        answer = json.loads(content)
        assert (answer["path"], answer["query"], answer["body"]) == ("/a%2Fb%20c", "x=%20&y", "")
        sent = dict(answer["headers"])
        # Nothing is added that the client did not say, such as an encoding that it could not read.
        assert sent["x-one"] == "1" and set(sent) <= {"host", "x-one", "accept-encoding"}
        assert sent["accept-encoding"] == "identity"
        assert response.headers.get_all("x-two") == ["1", "2"]
        # In pieces, without a length; longer than max_bytes; bytes that are no text.
        for body in ((bytes([index]) * 900 for index in (250, 251)), bytes(range(256)) * 20):
            response, content = ask(server, "PUT", "/other", body)
            assert len(json.loads(content)["body"]) in (1_800, 5_120)
        response, content = ask(server, "POST", COMPLETIONS, b'{"model": "trex", "prompt": "' + b"w5 " * 500 + b'"}')
        assert response.getheader("x-trex-adapter") is None and json.loads(content)["body"].count("w5") == 500


def test_pieces_and_partings_pass_at_once(folder, upstream):
    with running(application(options(folder, upstream[1]))) as server:
        connection = HTTPConnection(server, timeout=60)
        connection.request("GET", "/slow")
        response = connection.getresponse()
        assert response.read1(5) == b"first"
        upstream[0].first_arrived.set()
        assert not upstream[0].client_gone.is_set()
        response.close()
        connection.close()
        assert upstream[0].client_gone.wait(60)


def test_llama_cpp_gets_a_list_of_loras(folder, upstream):
    with running(application(options(folder, upstream[1], llama_cpp=True))) as server:
        for prompt, number in ((["w6"], 1), ("w7", 2), ("w5", 0)):
            body = json.dumps({"model": "trex", "prompt": prompt, "lora": [{"id": 5, "scale": 2}]})
            _, content = ask(server, "POST", COMPLETIONS, body)
            expected = {"model": "trex", "prompt": prompt, "lora": [{"id": number, "scale": 1.0}]}
            assert json.loads(json.loads(content)["body"]) == expected
        # This server would answer them with the base model.
        for body in (b"", b'{"model": "trex"}', b'{"model": "trex", "prompt": "' + b"w5 " * 500 + b'"}'):
            response, content = ask(server, "POST", COMPLETIONS, body)
            assert response.status == 400 and b"T-REX cannot route this request" in content
    loaded = [{"id": 0, "path": "C:\\loras\\overall.gguf"}, {"id": 1, "path": "a/cluster_00.gguf"}]
    assert lora_ids(loaded, ["cluster_00", "overall"]) == {"cluster_00": 1, "overall": 0}
    for wrong, count in ((loaded[:1], 0), ([*loaded, {**loaded[1], "id": 2}], 2)):
        with pytest.raises(ValueError, match=f"has {count} adapters of the name cluster_00; expected one"):
            lora_ids(wrong, ["overall", "cluster_00"])
    # Without a list in a request, its scale counts; adapters that are not the folder's may be applied.
    other = {"id": 2, "path": "style.gguf", "scale": 1.0}
    assert lora_ids([*loaded, other], ["overall"]) == {"overall": 0}
    with pytest.raises(ValueError, match=r"applies the adapter cluster_00 .* --lora-scaled cluster_00\.gguf:0"):
        lora_ids([loaded[0], {**loaded[1], "scale": 0.5}], ["overall", "cluster_00"])


def test_what_cannot_be_forwarded_is_named(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with running(Proxy(f"http://{address}")) as server:
        response, content = ask(server, "GET", "/health")
        assert response.status == 502 and f"http://{address} does not answer".encode() in content
        # Put behind the server's address, this path would be the end of another one.
        with socket.create_connection(server.split(":"), timeout=60) as connection:
            connection.sendall(b"GET @example.com/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    for wrong in ("127.0.0.1:8000", "ftp://127.0.0.1", "http://"):
        with pytest.raises(ValueError, match="is no address; expected one such as http"):
            Proxy(wrong)
