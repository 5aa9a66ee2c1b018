"""Serve an exported T-REX with llama.cpp's server behind one model's name, "trex"; stock PEFT beside it.

    python examples/serve_llama.py --llama FOLDER [--export FOLDER] [--model FOLDER] [--data FILE.jsonl]

FOLDER has llama.cpp's sources, of which the converters are used, and in python/ the package xllamacpp, which carries
llama.cpp's server; `make serve-llama` sets both up. The exported folder is what `peft_trex.save_trex_as_lora(model,
folder)` writes. Makes GGUF files of the base model and of all adapters in float32, starts the server with them and
`python -m peft_trex.serve_router` before it, and sends prompts to the model "trex", as token ids, as texts and as
chats. Compares the adapters with those that the router chooses, and the greedy tokens with those of stock PEFT for
these adapters. Works offline.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import serve
from serve import BASE, StockPeft, Tokens, check_export, differing, free_address, running, until_end
from serve_client import encode, load_router
from serve_endpoint import MODEL, ask
from tasks import generate, load
from transformers import AutoTokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def convert(llama: Path, script: str, *arguments: str | Path) -> None:
    """Run one of llama.cpp's converters, in this process: dozens of them would import torch dozens of times."""
    before = sys.argv
    sys.argv = [script, *map(str, arguments), "--outtype", "f32"]
    try:
        runpy.run_path(str(llama / script), run_name="__main__")
    finally:
        sys.argv = before


def convert_all(llama: Path, base: str, adapters: dict[str, Path], out: Path) -> Path:
    """Write the base model and the adapters as GGUF files; gives that of the base model."""
    # The converters' own modules lie beside them, and tell of each tensor.
    sys.path.insert(0, str(llama.resolve()))
    logging.disable(logging.INFO)
    whole = out / "base.gguf"
    convert(llama, "convert_hf_to_gguf.py", base, "--outfile", whole)
    for name, folder in adapters.items():
        convert(llama, "convert_lora_to_gguf.py", folder, "--base", base, "--outfile", out / f"{name}.gguf")
    logging.disable(logging.NOTSET)
    return whole


def complete(server: str, path: str, body: dict[str, Any], max_tokens: int) -> tuple[str | None, Tokens]:
    """The adapter that an answer names, and its greedy tokens, as the server counts them among its probabilities."""
    # What ignores the end of a text never takes it for the most probable token here, as stock PEFT does.
    few = {"max_tokens": max_tokens, "temperature": 0, "cache_prompt": False}
    probabilities = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    status, adapter, answer = ask(server, path, {"model": MODEL, **few, **probabilities, **body})
    if status != 200:
        raise SystemExit(f"{path} answered {status}: {answer}")
    return adapter, [one["id"] for one in answer["choices"][0]["logprobs"]["content"]]


def forms(tokenizer: Any, questions: Sequence[str], router: Any) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Each question in all the forms that a request for it can have; chats for an adapter that was trained on some."""
    ids = [encode(tokenizer, question, router) for question in questions]
    found = {
        "token ids": [(COMPLETIONS, {"prompt": one}) for one in ids],
        "texts": [(COMPLETIONS, {"prompt": tokenizer.decode(one), "add_special_tokens": False}) for one in ids],
    }
    if router.chat_markers is not None:
        chats = [[{"role": "user", "content": question}] for question in questions]
        found["chats"] = [(CHAT, {"messages": one}) for one in chats]
    return {**found, "requests to the base model": [(path, {**body, "model": BASE}) for path, body in found["texts"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, default=Path(".llama.cpp"), help="llama.cpp's sources and server")
    parser.add_argument("--export", type=Path, default=Path("runs/quickstart/lora"), help="exported folder")
    parser.add_argument("--model", help="folder of the base model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="JSONL of task, prompt and answer (default: generated)")
    parser.add_argument("--prompts", type=int, default=16, help="how many prompts to send, all of them at once")
    parser.add_argument("--max-tokens", type=int, default=16, help="new tokens of each prompt")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for a server to get ready")
    parser.add_argument("--out", type=Path, default=Path("runs/serve"), help="folder for base model, GGUF and logs")
    arguments = parser.parse_args()
    # So that the servers are stopped then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    converter, written = arguments.llama / "convert_lora_to_gguf.py", arguments.export / "router.json"
    for file, maker in ((converter, "make serve-llama"), (written, "make demo")):
        if not file.is_file():
            raise SystemExit(f"There is no {file}; `{maker}` makes one.")
    router = load_router(arguments.export)
    check_export(router)
    out = arguments.out
    (out / "gguf").mkdir(parents=True, exist_ok=True)
    if arguments.model is None and not (out / "base").is_dir():
        subprocess.run([sys.executable, serve.__file__, "--save-base", "--out", str(out)], check=True)
    model = arguments.model or str(out / "base")
    start = time.monotonic()
    whole = convert_all(arguments.llama, model, router.adapters, out / "gguf")
    print(f"{len(router.adapters)} adapters are GGUF files, after {time.monotonic() - start:.0f} seconds")

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = load(arguments.data)[1] if arguments.data else generate()[1]
    questions = [row["prompt"] for row in rows[: arguments.prompts]]
    prompts = [encode(tokenizer, question, router) for question in questions]
    routed = router.adapter_names(prompts)
    peft = StockPeft(model, router.adapters, tokenizer.eos_token_id)
    expected = peft.complete_all(routed, prompts, arguments.max_tokens)
    plain = peft.complete_all([BASE] * len(prompts), prompts, arguments.max_tokens)
    # Stock PEFT did all of this alone.
    assert "peft_trex" not in sys.modules
    changed = sum(ours != theirs for ours, theirs in zip(expected, plain, strict=True))
    print(f"{len(prompts)} prompts are routed to {len(set(routed))} adapters, which change the tokens of {changed}")
    ends = {tokenizer.eos_token_id}

    engine, server = free_address(), free_address()
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    files = [str(out / "gguf" / f"{name}.gguf") for name in router.adapters]
    command = [sys.executable, str(Path(__file__).with_name("llama_server.py")), engine.split(":")[1], threads]
    command += [str(whole), *files]
    carried = {"PYTHONPATH": os.pathsep.join([str(arguments.llama / "python"), os.environ.get("PYTHONPATH", "")])}
    proxy = [sys.executable, "-m", "peft_trex.serve_router", str(arguments.export), "--llama-cpp"]
    proxy += ["--upstream", f"http://{engine}", "--port", server.split(":")[1], "--tokenizer", model]
    with (
        running(command, engine, out / "llama.log", arguments.timeout, carried),
        running(proxy, server, out / "proxy.log", arguments.timeout, {}),
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        for title, bodies in forms(tokenizer, questions, router).items():
            asked = [pool.submit(complete, server, path, body, arguments.max_tokens) for path, body in bodies]
            adapters, found = zip(*(one.result() for one in asked), strict=True)
            names, right = ([BASE] * len(prompts), plain) if "base" in title else (routed, expected)
            wanted = [None if name == BASE else name for name in names]
            if list(adapters) != wanted:
                raise SystemExit(f"{title} got the adapters {adapters}, and the router chooses {wanted}.")
            same = len(prompts) - differing(peft, names, prompts, right, list(found), ends)
            total = sum(len(until_end(tokens, ends)) for tokens in right)
            said = f"greedy tokens of {same} of {len(prompts)} prompts are those of stock PEFT"
            print(f"{title}: {said} ({total} tokens)", flush=True)


if __name__ == "__main__":
    main()
