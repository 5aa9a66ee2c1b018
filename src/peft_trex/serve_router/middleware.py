"""The ASGI middleware: requests for a whole exported folder reach the server as requests for one of its adapters."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .prompts import ROUTES, Refused, Unreadable
from .routing import Choice, Routing

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MODELS = "/v1/models"
# A body of so many bytes is read in a millisecond or two. On a busy machine a thread may wait longer for its turn.
AT_ONCE = 8 << 10
HEADER = b"x-trex-adapter"


class TRexMiddleware:
    """Gives each request for the folder's model the adapter of its prompt's cluster; all others pass as they are.

    `vllm serve BASE --enable-lora ... --middleware peft_trex.serve_router.TRexMiddleware` makes it without a routing,
    which then comes from the environment, as `Routing.from_environment` reads it.

    The answer has the header `x-trex-adapter`. A body that cannot be parsed, or is longer than `Routing.max_bytes`,
    passes unchanged, and the server refuses it, since it has no model of that name. A request that one adapter cannot
    be told for is refused here, with status 400 and the reason.

    Args:
        app: the ASGI application behind.
        routing: the folder.
    """

    def __init__(self, app: App, routing: Routing | None = None) -> None:
        self.app = app
        self.routing = routing or Routing.from_environment()
        self._created = int(time.time())
        # The server's own loop goes on while a long body is read. One thread only: a tokenizer must not be used by two
        # at once, so that short bodies wait for it, too, while it is at work.
        self._worker = ThreadPoolExecutor(1, "trex")
        self._work: list[Future[Choice | None]] = []

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if scope["method"] == "POST" and path in ROUTES:
                return await self._route(path, scope, receive, send)
            if scope["method"] == "GET" and path == MODELS:
                return await self.app(scope, receive, self._with_card(send))
        await self.app(scope, receive, send)

    async def _route(self, path: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        messages: list[Message] = []
        length, whole = 0, False
        while not whole and length <= self.routing.max_bytes:
            messages.append(await receive())
            length += len(messages[-1].get("body", b""))
            whole = not messages[-1].get("more_body", False)
        content = b"".join(message.get("body", b"") for message in messages)
        try:
            if length > self.routing.max_bytes:
                raise Unreadable(f"it is longer than {self.routing.max_bytes} bytes")
            choice = await self._choose(path, content)
        except Unreadable as error:
            if self.routing.target.ignores_names:
                reason = str(error) or "its body has not the form that this route asks for"
                return await answer_error(400, f"T-REX cannot route this request: {reason}.", send)
            choice = None
        except Refused as error:
            return await answer_error(400, f"T-REX cannot route this request: {error}.", send)
        if choice is None:
            return await self.app(scope, _replay(messages, receive), send)
        framing = (b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in framing]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(choice.content)).encode())]}
        body: Message = {"type": "http.request", "body": choice.content, "more_body": False}
        await self.app(scope, _replay([body], receive), _with_header(send, choice.adapter))

    async def _choose(self, path: str, content: bytes) -> Choice | None:
        """`Routing.choose`, in the worker if the body is long or the worker is at work."""
        self._work = [one for one in self._work if not one.done()]
        if len(content) <= AT_ONCE and not self._work:
            return self.routing.choose(path, content)
        self._work.append(self._worker.submit(self.routing.choose, path, content))
        return await asyncio.wrap_future(self._work[-1])

    def _with_card(self, send: Send) -> Send:
        """A `send` that adds the folder's model to the server's list of models."""
        held: list[Message] = []

        async def send_list(message: Message) -> None:
            held.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                for one in self._listed(held):
                    await send(one)

        return send_list

    def _listed(self, held: list[Message]) -> list[Message]:
        """The messages of an answer, with one more model in it where it is a list of models."""
        start, *bodies = held
        try:
            listed = json.loads(b"".join(body.get("body", b"") for body in bodies))
            card = {"id": self.routing.name, "object": "model", "created": self._created, "owned_by": "peft-trex"}
            listed["data"] = [*listed["data"], card]
        except (ValueError, TypeError, KeyError):
            return held
        content = json.dumps(listed).encode()
        headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        start = {**start, "headers": [*headers, (b"content-length", str(len(content)).encode())]}
        return [start, {"type": "http.response.body", "body": content, "more_body": False}]


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives these messages, and then what comes after them."""
    waiting = iter(messages)

    async def replay() -> Message:
        return next(waiting, None) or await receive()

    return replay


def _with_header(send: Send, adapter: str) -> Send:
    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (HEADER, adapter.encode())]}
        await send(message)

    return send_with_header


async def answer_error(status: int, reason: str, send: Send) -> None:
    """Answer with an error of the form that OpenAI's clients read."""
    error = {"message": reason, "type": "TRexRouterError", "param": None, "code": status}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
