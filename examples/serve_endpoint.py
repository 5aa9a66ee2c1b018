"""What examples/serve.py asks of the model "trex": right adapters in every form of a request, and what that costs."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODEL = "trex"  # no adapter's name: the server chooses
MANY = 500
TOKENIZING = "the tokenizer alone"


def ask(server: str, path: str, body: Any, method: str = "POST") -> tuple[int, str | None, Any]:
    """The status of an answer, the adapter that it names, and what it holds."""
    connection = http.client.HTTPConnection(server, timeout=600)
    try:
        content = body if isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    return response.status, response.headers["x-trex-adapter"], json.loads(text) if text else None


def forms(prompt: str) -> dict[str, dict[str, Any]]:
    """One prompt as each route takes it that a chat can come by."""
    user, turn = {"role": "user", "content": prompt}, {"role": "user", "content": "Hello, who are you?"}
    parts = {"role": "user", "content": [{"type": "text", "text": prompt}]}
    few: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
    return {
        "/v1/chat/completions": {"messages": [turn, {"role": "assistant", "content": "A model."}, parts], **few},
        "/v1/responses": {"input": prompt, "instructions": "Answer in one word.", "max_output_tokens": 1},
        "/tokenize": {"messages": [{"role": "system", "content": "Answer in one word."}, user]},
    }


def check_endpoint(server: str, router: Any, prompts: Sequence[str]) -> None:
    """Refuses an endpoint that takes another adapter than the router does for the tokens that the server makes."""
    listed = [model["id"] for model in ask(server, "/v1/models", b"", "GET")[2]["data"]]
    if MODEL not in listed:
        raise SystemExit(f"/v1/models lists {listed}, and not {MODEL}.")
    for prompt in prompts[:8]:
        for path, body in forms(prompt).items():
            status, adapter, answer = ask(server, path, {"model": MODEL, **body})
            if path == "/tokenize":
                tokens = answer["tokens"]
            else:
                tokens = ask(server, f"{path}/render", {"model": adapter, **body})[2]["token_ids"]
            if status != 200 or adapter != router.route(tokens).adapter:
                raise SystemExit(f"{path} took {adapter} (status {status}) for {prompt!r}: {answer}")
    print(f"chats, responses and tokens of {len(prompts[:8])} prompts: the adapter of the server's own tokens")
    start = time.perf_counter()
    with ThreadPoolExecutor(MANY) as pool:
        bodies = [{"model": MODEL, **forms(prompts[index % len(prompts)])["/tokenize"]} for index in range(MANY)]
        answers = list(pool.map(lambda body: ask(server, "/tokenize", body), bodies))
    wrong = sum(adapter != router.route(answer["tokens"]).adapter for _, adapter, answer in answers)
    used = len({adapter for _, adapter, _ in answers})
    print(
        f"{MANY} requests at once to {used} adapters, in {time.perf_counter() - start:.1f} seconds: {wrong} misrouted"
    )
    if wrong:
        raise SystemExit("Requests at once are misrouted.")
    check_hostile(server)


def check_hostile(server: str) -> None:
    """Refuses an endpoint that answers a hostile request otherwise than the server does for a model it has not."""
    path, kinds = "/v1/completions", {"no JSON": b'{"model": "%s", "prompt": ', "empty": b""}
    kinds["another type"] = b'{"model": "%s", "prompt": {"text": 1}}'
    kinds["Latin-1"] = '{"model": "%s", "prompt": "é"}'.encode("latin-1")
    kinds["compressed"] = gzip.compress(kinds["another type"])
    kinds["12 MB"] = b'{"model": "%s", "prompt": "' + b"long " * 2_400_000 + b'"}'
    found = {}
    for kind, body in kinds.items():
        # The model's name is in the body, so that only a server that reads this one can mind it.
        status, adapter, _ = ask(server, path, body.replace(b"%s", MODEL.encode()))
        plain, _, _ = ask(server, path, body.replace(b"%s", b"nothing"))
        if status != plain or status < 400 or adapter is not None:
            raise SystemExit(f"A hostile body ({kind}) gets status {status}, and without routing {plain}.")
        found[kind] = status
    print("hostile bodies get the server's own errors:", ", ".join(f"{kind} {code}" for kind, code in found.items()))


def overhead(export: Path, tokenizer: str, length: int = 1000) -> None:
    """Print what routing a request of `length` tokens takes, without a server, beside the tokenizer alone."""
    from peft_trex.serve_router import Routing, TRexMiddleware

    routing = Routing(export, tokenizer=tokenizer)
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    words = tokens.decode(tokens(" ".join(f"word{index}" for index in range(length)))["input_ids"][: length - 20])
    text = tokens.apply_chat_template([{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True)
    ids = tokens(text, add_special_tokens=False)["input_ids"]

    async def server(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    middleware, loop = TRexMiddleware(server, routing), asyncio.new_event_loop()

    def request(path: str, body: dict[str, Any]) -> Callable[[], Any]:
        content = json.dumps({"model": MODEL, **body}).encode()
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        return lambda: loop.run_until_complete(middleware(scope, receive, None))

    calls = {
        TOKENIZING: lambda: tokens(text, add_special_tokens=False)["input_ids"],
        "the router, ids given": lambda: routing.router.route(ids),
        "a request of ids": request("/v1/completions", {"prompt": ids}),
        "a request of text": request("/v1/completions", {"prompt": text, "add_special_tokens": False}),
        "a chat": request("/v1/chat/completions", {"messages": [{"role": "user", "content": words}]}),
    }
    times: dict[str, list[float]] = {title: [] for title in calls}
    for _ in range(300):
        for title, run in calls.items():
            start = time.perf_counter()
            run()
            times[title].append(1000 * (time.perf_counter() - start))
    loop.close()
    taken = {title: statistics.median(found) for title, found in times.items()}
    print(f"\nmilliseconds for a request of {len(ids)} tokens, and times {TOKENIZING} (medians of 300, in turns)")
    for title, time_of_one in taken.items():
        print(f"{title:<28}{time_of_one:>8.2f}{time_of_one / taken[TOKENIZING]:>8.2f}")
