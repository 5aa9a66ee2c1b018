"""What `make serve` does around vLLM: the client, stock PEFT beside it, and what is said when something is missing."""

import json
import shutil
import signal
import sys
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import PAD, VOCAB, adapted, batches, make_llama, prompts
from serve import BASE, StockPeft, check_export, main, until_end
from serve_client import complete_all, load_router

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
