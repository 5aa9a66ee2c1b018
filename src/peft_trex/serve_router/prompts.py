"""From the body of a request to the token ids of its prompts, as the server makes them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..lora.semantic_router import latest_message

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, TOKENIZE = "/v1/responses", "/tokenize"
ROUTES = (COMPLETIONS, CHAT, RESPONSES, TOKENIZE)
TEXTS = ("text", "input_text", "output_text")
# What a chat template gets of a message; servers drop the rest.
FIELDS = ("role", "name", "tool_call_id", "reasoning", "reasoning_content")
IN_PIECES = "for an adapter without chat_markers, whose router needs every token of the prompt as the server writes it"


class Unreadable(ValueError):
    """The body has not the form that its route asks for, which the server says in its own words."""


class Refused(ValueError):
    """The server might answer this request, but nobody can tell which one adapter it is for."""


class PromptReader:
    """Makes the token ids that a server makes of a request, with the same tokenizer and chat template.

    Args:
        tokenizer: the served model's, from transformers.
        chat_template: a template in the tokenizer's place, as of `vllm serve --chat-template`.
        markers: the chat markers of the router, or None where it pools all tokens of a prompt.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, markers: Mapping[str, Sequence[int]] | None) -> None:
        self._tokenizer, self._template, self._markers = tokenizer, chat_template, markers
        self._backend = _backend_of(tokenizer)
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._takes_parts = self._template_takes_parts()

    def read(self, path: str, body: Mapping[str, Any]) -> list[list[int]]:
        """The token ids of each prompt in a request to one of `ROUTES`.

        Raises:
            Unreadable: where the server has an error of its own.
            Refused: where the server might know a prompt that is not known here.
        """
        if body.get("truncate_prompt_tokens") is not None:
            raise Refused("truncate_prompt_tokens cuts the prompt by which the adapter is chosen; cut it yourself")
        if path == RESPONSES:
            return [self._chat(body, self._messages_of_responses(body))]
        if path == CHAT or (path == TOKENIZE and "prompt" not in body):
            return [self._chat(body, body.get("messages"))]
        return self._completions(body)

    def _completions(self, body: Mapping[str, Any]) -> list[list[int]]:
        if body.get("prompt_embeds") is not None:
            raise Refused("the adapter is chosen by a prompt's tokens, and prompt_embeds has none")
        prompt, special = body.get("prompt"), _flag(body, "add_special_tokens", True)
        prompts = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
        if not isinstance(prompts, list) or not prompts:
            raise Unreadable
        if all(isinstance(one, str) for one in prompts):
            return [self._encode(one, special) for one in prompts]
        if all(_are_ids(one) for one in prompts):
            return prompts
        raise Unreadable

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            if self._backend is not None:
                return self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
            return self._tokenizer(text, add_special_tokens=special)["input_ids"]
        except (TypeError, ValueError) as error:
            # Half a surrogate pair is such a text.
            raise Refused(f"the tokenizer cannot read the prompt ({error})") from error

    def _chat(self, body: Mapping[str, Any], messages: Any) -> list[int]:
        if body.get("chat_template") is not None:
            raise Refused("a chat_template in a request is not run; leave it out")
        conversation = self._conversation(messages)
        options = _object(body, "chat_template_kwargs") or {}
        taken = sorted(set(options) & self._reserved)
        if taken:
            raise Refused(f"chat_template_kwargs holds {', '.join(taken)}, which a template is not given that way")
        extras = {name: value for name, value in _extras(body).items() if name not in options}
        ids = self._written(body, conversation, {**options, **extras})
        if extras and self._pooled(ids) != self._pooled(self._written(body, conversation, options)):
            raise Refused(
                f"{', '.join(extras)} would count in the choice, and only the server knows how it is written"
            )
        return ids

    def _written(
        self, body: Mapping[str, Any], conversation: list[dict[str, Any]], options: Mapping[str, Any]
    ) -> list[int]:
        """The tokens of a conversation as the chat template writes it."""
        flags = {
            "add_generation_prompt": _flag(body, "add_generation_prompt", True),
            "continue_final_message": _flag(body, "continue_final_message", False),
        }
        special = _flag(body, "add_special_tokens", False)
        # A template is a program, which may fail in any way.
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, chat_template=self._template, tokenize=False, **flags, **options
            )
        except Exception as error:
            raise Refused(f"the chat template cannot write these messages ({error})") from error
        return self._encode(text, special)

    def _pooled(self, ids: list[int]) -> list[int]:
        """The tokens that the router counts."""
        message = None if self._markers is None else latest_message(np.array(ids), self._markers)
        return ids if message is None else ids[message]

    def _conversation(self, messages: Any) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        if not isinstance(messages, list) or not messages:
            raise Unreadable
        conversation = []
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise Unreadable
            written = {name: message[name] for name in FIELDS if message.get(name) is not None}
            written["content"] = self._content(message.get("content"))
            if message.get("tool_calls"):
                written["tool_calls"] = _calls(message["tool_calls"])
            conversation.append(written)
        return conversation

    def _content(self, content: Any) -> str | list[dict[str, str]]:
        if content is None or isinstance(content, str):
            return content or ""
        texts = _texts(content)
        return [{"type": "text", "text": text} for text in texts] if self._takes_parts else "\n".join(texts)

    def _template_takes_parts(self) -> bool:
        """Whether the template itself walks through a content in parts; if not, servers join its texts by newlines."""
        parts = [{"type": "text", "text": f"part-{index}"} for index in range(2)]
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], chat_template=self._template, tokenize=False
            )
        except Exception:
            return False
        return "part-1" in text and "'type'" not in text and '"type"' not in text

    def _messages_of_responses(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of a request to `/v1/responses`, whose input is a text or a list of items."""
        items, instructions = body.get("input"), body.get("instructions")
        items = [{"role": "user", "content": items}] if isinstance(items, str) else items
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise Unreadable
        if not (instructions is None or isinstance(instructions, str)):
            raise Unreadable
        if body.get("previous_response_id") is not None:
            if self._markers is None:
                raise Refused(f"previous_response_id cannot be routed {IN_PIECES}")
            if not any(item.get("role") == "user" for item in items):
                raise Refused("the user's message stands in an earlier response, which only the server has; send it")
        if self._markers is None and items and items[-1].get("role") == "assistant":
            raise Refused(f"an answer to be continued cannot be routed {IN_PIECES}")
        messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
        for item in items:
            _add_item(messages, item)
        return messages


def _backend_of(tokenizer: Any) -> Any:
    """What makes the ids beneath a tokenizer of transformers, which makes much besides; None if that changes them."""
    names = ("__call__", "_encode_plus", "_batch_encode_plus", "_switch_to_input_mode")
    methods = [getattr(type(tokenizer), name, None) for name in names]
    common = all(one is None or one.__module__.startswith("transformers.tokenization_utils") for one in methods)
    if not tokenizer.is_fast or not common:
        return None
    # The first call takes off what the tokenizer's file says of padding and truncation, which servers do not heed.
    tokenizer("")
    return tokenizer.backend_tokenizer


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Append an item of a response's input to the messages, or to the latest one of them."""
    kind = item.get("type", "message")
    if kind == "message":
        messages.append(item)
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        if not messages or messages[-1].get("role") != "assistant":
            messages.append({"role": "assistant", "content": ""})
        calls = messages[-1].get("tool_calls") or []
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        messages[-1] = {**messages[-1], "tool_calls": [*calls, call]}
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind != "reasoning":
        raise Refused(f"an input of type {kind!r} cannot be routed; messages, functions' calls and outputs can")


def _flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise Unreadable
    return value


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = body.get(name)
    if not (value is None or isinstance(value, dict)):
        raise Unreadable
    return value


def _extras(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat template gets beside the messages; servers write some of it in ways of their own."""
    effort = body.get("reasoning_effort") or (_object(body, "reasoning") or {}).get("effort")
    found = {"tools": body.get("tools"), "documents": body.get("documents"), "reasoning_effort": effort}
    for value, kind in zip(found.values(), (list, list, str), strict=True):
        if not (value is None or isinstance(value, kind)):
            raise Unreadable
    # The tools of a request to /v1/responses lack a level that chat templates expect.
    found["tools"] = [
        tool if not isinstance(tool, dict) or "function" in tool else {"type": "function", "function": tool}
        for tool in found["tools"] or []
    ]
    found = {name: value for name, value in found.items() if value}
    return {**found, "enable_thinking": effort != "none"} if effort else found


def _are_ids(value: Any) -> bool:
    """Whether a value is a prompt of token ids; true and false are no numbers here."""
    return isinstance(value, list) and set(map(type, value)) == {int}


def _texts(content: Any) -> list[str]:
    """The texts of a content in parts."""
    if not isinstance(content, list) or not all(isinstance(part, (str, dict)) for part in content):
        raise Unreadable
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if part.get("type") not in TEXTS:
            raise Refused(f"a content of type {part.get('type')!r} cannot be routed; texts can")
        if not isinstance(part.get("text"), str):
            raise Unreadable
    return [part["text"] for part in parts]


def _calls(calls: Any) -> list[dict[str, Any]]:
    """An assistant's calls of tools, with arguments as objects, which chat templates expect."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Unreadable
    parsed = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict):
            raise Unreadable
        arguments = function.get("arguments")
        if isinstance(arguments, str) or arguments is None:
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise Refused("the arguments of a tool's call are no JSON") from error
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed
