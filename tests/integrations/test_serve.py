"""What `make serve` and `make serve-llama` do around the engines: clients, stock PEFT beside them, what is missing."""

import json
import shutil
import signal
import sys
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import serve_llama
from conftest import PAD, VOCAB, adapted, batches, make_llama, prompts
from serve import BASE, StockPeft, check_export, main, until_end
from serve_client import complete_all, load_router
from serve_endpoint import check_endpoint, overhead
from texts import make_tokenizer

from peft_trex import calibrate_trex_merge, save_trex_as_lora


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = adapted()
    calibrate_trex_merge(model, batches(), per_cluster=True, progress=False)
    save_trex_as_lora(model, folder / "lora")
    make_llama().save_pretrained(folder / "base")
    return folder


def test_stock_peft_serves_each_row_with_its_own_adapter(export):
    router = load_router(export / "lora")
    assert check_export(router) == 2
    rows = [row[: 9 - index].tolist() for index, row in enumerate(prompts(6))]
    names = [BASE, *router.adapter_names(rows[1:])]
    assert len(set(names)) > 2
    peft = StockPeft(str(export / "base"), router.adapters, PAD)
    mixed = peft.complete_all(names, rows, 5)
    apart = [peft.complete_all([name], [row], 5)[0] for name, row in zip(names, rows, strict=True)]
    assert mixed == apart
    assert any(peft.complete_all([BASE] * 6, rows, 5)[index] != row for index, row in enumerate(mixed))
    best, other = mixed[1][0], (mixed[1][0] + 1) % VOCAB
    assert peft.margin(names[1], rows[1], best, other) > 0
    assert until_end([4, 5, 2, 7], {2}) == [4, 5, 2] and until_end([4, 5], {2}) == [4, 5]


def test_code_that_lies_in_the_folder_does_not_run(export, tmp_path):
    folder, ran = shutil.copytree(export / "lora", tmp_path / "lora"), tmp_path / "ran"
    (folder / "semantic_router.py").write_text(f"open({str(ran)!r}, 'w').write('ran')\n")
    with pytest.raises(SystemExit, match=r"semantic_router\.py has changed since the export"):
        load_router(folder)
    # As in folders of before there were hashes, which brought their own code.
    settings = json.loads((folder / "router.json").read_text())
    del settings["hashes"]
    (folder / "router.json").write_text(json.dumps(settings))
    (folder / "SHA256SUMS").unlink()
    assert load_router(folder).clusters == load_router(export / "lora").clusters
    assert not ran.exists()


@pytest.fixture
def server():
    """Answers a request for a completion with the prompt backwards, and knows one adapter."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = asked["model"] == "cluster_00" and asked["temperature"] == 0 and self.path == "/v1/completions"
            answer = {"choices": [{"token_ids": asked["prompt"][::-1][: asked["max_tokens"]]}]}
            body = json.dumps(answer if known else {"error": "no such model"}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_the_client_asks_for_all_at_once_and_keeps_their_order(server):
    rows = [[index, 7, 8, 9] for index in range(12)]
    assert complete_all(server, ["cluster_00"] * 12, rows, 4) == [row[::-1] for row in rows]
    with pytest.raises(HTTPException, match=r"status 404 for a request to 'cluster_99'.*no such model"):
        complete_all(server, ["cluster_00", "cluster_99"], rows[:2], 4)


@pytest.fixture
def endpoint(export):
    """Chooses adapters as the router does, by the length of each body as its token; `faults` make it do otherwise."""
    router, faults = load_router(export / "lora"), []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, answer, adapter=None):
            self.send_response(status)
            if adapter is not None:
                self.send_header("x-trex-adapter", adapter)
            body = json.dumps(answer).encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer(200, {"data": [{"id": "base" if "list" in faults else "trex"}]})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                asked = json.loads(body)
                tokens = [3 + len(json.dumps({**asked, "model": ""})) % 60]
                assert asked["model"] == "trex" or self.path.endswith("/render")
            except (ValueError, AssertionError):
                return self.answer(400 if "hostile" not in faults or b"trex" not in body else 404, {})
            if self.path == "/v1/completions":
                return self.answer(400, {})
            adapter = "overall" if self.path in faults else router.route(tokens).adapter
            self.answer(200, {"token_ids": tokens, "tokens": tokens}, None if "render" in self.path else adapter)

        def log_message(self, *args):
            pass

    # 500 clients connect at once.
    server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 600})(("127.0.0.1", 0), Handler)
    with server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", router, faults
        server.shutdown()


def test_an_endpoint_that_misroutes_is_told(endpoint, capsys):
    server, router, faults = endpoint
    prompts = ["w" * length for length in range(1, 30, 3)]
    check_endpoint(server, router, prompts)
    printed = capsys.readouterr().out
    assert "500 requests at once" in printed and "0 misrouted" in printed and "12 MB 400" in printed
    for fault, words in (
        ("list", r"/v1/models lists \['base'\]"),
        ("/v1/responses", "/v1/responses took overall"),
        ("/tokenize", "/tokenize took overall"),
        ("hostile", r"hostile body \(no JSON\) gets status 404, and without routing 400"),
    ):
        faults[:] = [fault]
        with pytest.raises(SystemExit, match=words):
            check_endpoint(server, router, prompts)


def test_the_overhead_is_measured_on_the_length_that_it_says(export, tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path)
    overhead(export / "lora", str(tmp_path), 200)
    printed = capsys.readouterr().out
    assert "milliseconds for a request of" in printed
    assert [float(line.split()[-1]) > 0 for line in printed.splitlines()[-5:]] == [True] * 5


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("vllm", "There is no Python .*make serve"),
        ("router.json", "holds no router.json.*save_trex_as_lora"),
        ("cluster_01/adapter_model.safetensors", "no .*cluster_01/adapter_model.safetensors .*SHA256SUMS lists"),
    ],
)
def test_what_is_missing_is_named_before_anything_starts(tmp_path, monkeypatch, export, missing, words):
    folder = tmp_path / "lora"
    shutil.copytree(export / "lora", folder)
    if missing != "vllm":
        (folder / missing).unlink()
    python = tmp_path / "none" if missing == "vllm" else sys.executable
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["serve.py", "--vllm", str(python), "--export", str(folder), "--out", "nowhere"])
    with pytest.raises(SystemExit, match=words):
        main()
    assert not Path("nowhere").exists()


def test_of_llama_cpp_too(tmp_path, monkeypatch, export):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    llama, folder = tmp_path / "llama", tmp_path / "lora"
    given = ["serve_llama.py", "--llama", str(llama), "--export", str(folder), "--out", str(tmp_path / "nowhere")]
    monkeypatch.setattr(sys, "argv", given)
    llama.mkdir()
    for file, words in (
        (llama / "convert_lora_to_gguf.py", r"convert_lora_to_gguf\.py; `make serve-llama` makes one"),
        (folder / "router.json", r"router\.json; `make demo` makes one"),
    ):
        with pytest.raises(SystemExit, match=words):
            serve_llama.main()
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert not (tmp_path / "nowhere").exists()


def test_a_converter_gets_its_arguments_and_leaves_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ours"])
    (tmp_path / "one.py").write_text("import sys\nopen(sys.argv[2], 'w').write(' '.join([__name__, *sys.argv[1:]]))\n")
    serve_llama.convert(tmp_path, "one.py", "--outfile", tmp_path / "out")
    assert (tmp_path / "out").read_text() == f"__main__ --outfile {tmp_path / 'out'} --outtype f32"
    assert sys.argv == ["ours"]


def test_a_chat_and_a_text_ask_llama_cpp_for_the_tokens_in_its_ways(monkeypatch):
    asked = []

    def answer(server, path, body):
        asked.append((path, body))
        tokens = {"content": [{"id": 5}, {"id": 2}]}
        return (200, "cluster_00", {"choices": [{"logprobs": tokens}]}) if len(asked) < 5 else (500, "", 0)

    monkeypatch.setattr(serve_llama, "ask", answer)
    tokenizer, router = make_tokenizer(), SimpleNamespace(chat_markers={})
    assert "chats" not in serve_llama.forms(tokenizer, ["w5 w6"], SimpleNamespace(chat_markers=None))
    for title, ((path, body),) in serve_llama.forms(tokenizer, ["w5 w6"], router).items():
        assert serve_llama.complete("here", path, body, 3) == ("cluster_00", [5, 2])
        sent = asked[-1][1]
        assert (sent["max_tokens"], sent["temperature"]) == (3, 0)
        assert sent["model"] == (BASE if "base" in title else "trex")
        # A chat's probabilities are asked for by yes or no, a text's by their number.
        assert sent["logprobs"] is True if path == serve_llama.CHAT else sent["logprobs"] == 1
    prompts = [body.get("prompt", body.get("messages")) for _, body in asked]
    assert prompts == [[3, 5, 6, 4], "w3 w5 w6 w4", [{"role": "user", "content": "w5 w6"}], "w3 w5 w6 w4"]
    with pytest.raises(SystemExit, match="answered 500"):
        serve_llama.complete("here", serve_llama.CHAT, {}, 3)
