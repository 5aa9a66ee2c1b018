"""What a request for a whole exported folder becomes: a request for the adapter of its cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..lora.semantic_router import ROUTER_JSON, SemanticRouter
from .prompts import PromptReader, Refused, Unreadable

MOST_BYTES = 8 << 20


class Choice(NamedTuple):
    """The adapter for a request, and the body that asks the server for it."""

    adapter: str
    content: bytes


class Target(Protocol):
    """How a server is told which adapter to take.

    Attributes:
        ignores_names: whether it answers a request for a model that it does not have. What cannot be read is then
            refused here; other servers refuse it themselves, since they have no model of the folder's name.
    """

    ignores_names: bool

    def ask_for(self, adapter: str, body: dict[str, Any]) -> None:
        """Change a request's body so that it asks for an adapter."""


class ModelName:
    """Adapters are models, as in vLLM and SGLang; `pattern` makes a model's name of an adapter's."""

    ignores_names = False

    def __init__(self, pattern: str = "{}") -> None:
        if pattern.count("{}") != 1:
            raise ValueError(
                f"{pattern!r} makes no model's name of an adapter's; expected one {{}}, as in 'BASE:{{}}'."
            )
        self._pattern = pattern

    def ask_for(self, adapter: str, body: dict[str, Any]) -> None:
        body["model"] = self._pattern.replace("{}", adapter)


class LoraList:
    """Adapters are numbers, as in llama.cpp's server, which takes a list of them in each request."""

    ignores_names = True

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids

    def ask_for(self, adapter: str, body: dict[str, Any]) -> None:
        body["lora"] = [{"id": self._ids[adapter], "scale": 1.0}]


class Routing:
    """An exported folder behind one model's name.

    Attributes:
        name: that name.
        router: the folder's `SemanticRouter`.
        target: how the server is told which adapter to take.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str = "trex",
        tokenizer: str | os.PathLike[str] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        target: Target | None = None,
        max_bytes: int = MOST_BYTES,
        adapters: bool = True,
    ) -> None:
        """Load the folder's router and the served model's tokenizer.

        Args:
            folder: what `save_trex_as_lora(model, folder)` wrote.
            name: the model's name by which clients ask for the folder.
            tokenizer: name or folder of the served model, by default that in the export.
            chat_template: a file, where the server has another chat template than the tokenizer.
            target: how the server is told; by default an adapter is a model of its name.
            max_bytes: the longest body that is read, in bytes.
            adapters: whether the adapters lie in the folder, and their hashes are checked.

        Raises:
            FileNotFoundError, OSError, ValueError: as `SemanticRouter.from_pretrained` and transformers raise them, or
                for a folder whose prior needs embeddings from another model.
        """
        self.name, self.max_bytes = name, max_bytes
        self.router = SemanticRouter.from_pretrained(folder, adapters=adapters)
        try:
            self.router.route([])
        except ValueError as error:
            raise ValueError(
                f"A server has a prompt's tokens alone, which {folder} cannot route by: {error}"
            ) from error
        settings = json.loads((Path(folder) / ROUTER_JSON).read_text(encoding="utf-8"))
        tokenizer = tokenizer or settings.get("base_model_name_or_path")
        if not tokenizer:
            raise ValueError(f"{folder} does not name its base model; say which tokenizer its prompts are read with.")
        # A client of the router alone needs no transformers.
        from transformers import AutoTokenizer

        template = None if chat_template is None else Path(chat_template).read_text(encoding="utf-8")
        self._reader = PromptReader(AutoTokenizer.from_pretrained(tokenizer), template, self.router.chat_markers)
        self.target: Target = target or ModelName()

    @classmethod
    def from_environment(cls) -> Routing:
        """Read TREX_FOLDER and, where they are set, TREX_MODEL, TREX_TOKENIZER, TREX_CHAT_TEMPLATE, TREX_ADAPTER_NAMES
        and TREX_MAX_BYTES: servers make their middleware without arguments.

        Raises:
            ValueError: if TREX_FOLDER is not set, or TREX_MAX_BYTES is no number.
        """
        folder = os.environ.get("TREX_FOLDER")
        if not folder:
            raise ValueError("TREX_FOLDER is not set; set it to the folder that save_trex_as_lora wrote.")
        return cls(
            folder,
            name=os.environ.get("TREX_MODEL", "trex"),
            tokenizer=os.environ.get("TREX_TOKENIZER"),
            chat_template=os.environ.get("TREX_CHAT_TEMPLATE"),
            target=ModelName(os.environ.get("TREX_ADAPTER_NAMES", "{}")),
            max_bytes=int(os.environ.get("TREX_MAX_BYTES", MOST_BYTES)),
        )

    def choose(self, path: str, content: bytes) -> Choice | None:
        """The adapter for a request, and its new body; None for a request to another model.

        Args:
            path: one of `prompts.ROUTES`.
            content: the body of the request, which need not be JSON.

        Raises:
            Unreadable: if the body has not the form that the route asks for.
            Refused: if one adapter cannot be told.
        """
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unreadable from error
        if not isinstance(body, dict):
            raise Unreadable
        if body.get("model") != self.name:
            return None
        prompts = self._reader.read(path, body)
        try:
            names = self.router.adapter_names(prompts)
        except (TypeError, ValueError, OverflowError) as error:
            raise Refused(str(error)) from error
        if len(set(names)) > 1:
            raise Refused(
                f"its {len(names)} prompts belong to the adapters {', '.join(sorted(set(names)))}, and a request goes "
                "to one; send one request for each prompt"
            )
        self.target.ask_for(names[0], body)
        return Choice(names[0], json.dumps(body).encode())
