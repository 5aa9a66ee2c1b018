"""Have a server complete prompts, each with the adapter of its cluster; the server knows nothing of T-REX.

    python examples/serve_client.py --export FOLDER --tokenizer NAME_OR_FOLDER [--server HOST:PORT] PROMPT ...

The export folder is one of `peft_trex.save_trex_as_lora`. Besides the tokenizer this needs numpy, safetensors and the
files of peft_trex, but not what that depends on, torch and peft: `pip install --no-deps peft-trex` will do.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def load_router(export: Path) -> Any:
    """The SemanticRouter of an exported folder, by the code that is installed: no folder's code is ever run."""
    package = importlib.util.find_spec("peft_trex")  # found, not imported: that would import torch and peft
    if package is None or package.origin is None:
        raise SystemExit("peft_trex is not installed in this Python: pip install --no-deps peft-trex")
    code = Path(package.origin).with_name("lora") / "semantic_router.py"
    spec = importlib.util.spec_from_file_location("semantic_router", code)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.SemanticRouter.from_pretrained(export)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


def encode(tokenizer: Any, prompt: str, router: Any) -> list[int]:
    """Token ids of a prompt, written as in training, since the router must see the same.

    A router with chat markers is of an adapter that was trained on chats; that of `make demo` was trained on plain
    prompts, as examples/small_model.py writes them.
    """
    text = f"{prompt} ="
    if router.chat_markers is not None:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def complete(
    server: str, model: str, token_ids: Sequence[int], max_tokens: int, ignore_eos: bool = False
) -> list[int]:
    """New token ids, greedy, from vLLM's OpenAI server at HOST:PORT; `model` is an adapter's or the base's name."""
    request = {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": ignore_eos,
        "return_token_ids": True,
    }
    connection = http.client.HTTPConnection(server, timeout=600)
    try:
        connection.request("POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = response.read().decode()
    finally:
        connection.close()
    if response.status != 200:
        raise http.client.HTTPException(f"status {response.status} for a request to {model!r}: {body[:500]}")
    return json.loads(body)["choices"][0]["token_ids"]


def complete_all(
    server: str, models: Sequence[str], prompts: Sequence[Sequence[int]], max_tokens: int, ignore_eos: bool = False
) -> list[list[int]]:
    """All requests at once, as from as many users."""
    pool = ThreadPoolExecutor(len(prompts))
    try:
        jobs = [
            pool.submit(complete, server, model, prompt, max_tokens, ignore_eos)
            for model, prompt in zip(models, prompts, strict=True)
        ]
        return [job.result() for job in jobs]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error or Ctrl-C nobody waits for the others


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--export", type=Path, required=True, help="exported folder; the server has its adapters")
    parser.add_argument("--tokenizer", required=True, help="name or folder of the base model")
    parser.add_argument("--server", default="127.0.0.1:8000", metavar="HOST:PORT")
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    router = load_router(arguments.export)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    prompts = [encode(tokenizer, prompt, router) for prompt in arguments.prompts]
    names = router.adapter_names(prompts)
    try:
        answers = complete_all(arguments.server, names, prompts, arguments.max_tokens)
    except (OSError, http.client.HTTPException) as error:
        raise SystemExit(f"The server at {arguments.server} failed: {error}") from error
    for prompt, name, answer in zip(arguments.prompts, names, answers, strict=True):
        print(f"{name}\t{prompt}\t{tokenizer.decode(answer, skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    main()
