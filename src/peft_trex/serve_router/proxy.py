"""A small reverse proxy as an ASGI application, to stand behind the middleware and before a server of any kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from .middleware import Message, Receive, Send, answer_error

# These belong to one connection, and are none of the other's business; the client writes the host by itself.
OF_CONNECTION = {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"}
OF_CONNECTION |= {b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host"}

try:
    import httpx
except ImportError as error:
    raise ImportError("The proxy needs httpx and uvicorn: pip install 'peft-trex[serve]'") from error


class Proxy:
    """Hands each request on to a server, and its answer back as it comes, piece by piece.

    A client that goes away ends its request at the server, too. A server that cannot be reached is an error 502.

    Args:
        upstream: the server's address, such as `http://127.0.0.1:8000`.
        client: what sends the requests; tests have one of their own.
    """

    def __init__(self, upstream: str, client: httpx.AsyncClient | None = None) -> None:
        self._upstream = httpx.URL(upstream)
        if self._upstream.scheme not in ("http", "https") or not self._upstream.host:
            raise ValueError(f"The upstream {upstream!r} is no address; expected one such as http://127.0.0.1:8000.")
        # An answer takes as long as it takes, and the server counts its connections.
        self._client = client or httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=10), limits=httpx.Limits(max_connections=None), trust_env=False
        )

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            return await send({"type": "websocket.close", "code": 1011})
        read = asyncio.Event()
        tasks = [asyncio.ensure_future(self._forward(scope, receive, send, read))]
        tasks.append(asyncio.ensure_future(_gone(receive, read)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            forwarded, _ = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(forwarded, Exception):
            raise forwarded

    async def _forward(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send, read: asyncio.Event
    ) -> None:
        path = scope.get("raw_path") or scope["path"].encode()
        # Anything else would be read as a part of the host's name.
        if not path.startswith(b"/"):
            return await answer_error(400, "The path of a request begins with /.", send)
        query = b"?" + scope["query_string"] if scope.get("query_string") else b""
        url = self._upstream.copy_with(raw_path=self._upstream.raw_path.rstrip(b"/") + path + query)
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in OF_CONNECTION]
        has_body = any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
        if not has_body:
            read.set()
        content = _body(receive, read) if has_body else None
        request = httpx.Request(scope["method"], url, headers=headers, content=content)
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            return await answer_error(502, f"The server at {self._upstream} does not answer ({error!r}).", send)
        try:
            headers = [(name, value) for name, value in answer.headers.raw if name.lower() not in OF_CONNECTION]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await answer.aclose()


async def _body(receive: Receive, read: asyncio.Event) -> AsyncIterator[bytes]:
    """The pieces of a request's body; then `read` is set."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        yield message.get("body", b"")
        more = message.get("more_body", False)
    read.set()


async def _gone(receive: Receive, read: asyncio.Event) -> None:
    """Wait until the client has gone away, once the request has been read."""
    await read.wait()
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
