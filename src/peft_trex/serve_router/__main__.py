"""Put an exported folder behind one model's name, in front of any OpenAI-compatible server.

    python -m peft_trex.serve_router FOLDER --upstream http://127.0.0.1:8000 [--port 8080]

The server has the folder's adapters under their names: vLLM, SGLang (`--adapter-names BASE:{}`), or llama.cpp's server
with `--lora-scaled NAME.gguf:0,...` (`--llama-cpp`). Needs httpx and uvicorn, not torch or PEFT.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .middleware import TRexMiddleware
from .proxy import Proxy
from .routing import MOST_BYTES, LoraList, ModelName, Routing

try:
    import httpx
    import uvicorn
except ImportError as error:
    raise SystemExit("The proxy needs httpx and uvicorn: pip install 'peft-trex[serve]'") from error


def lora_ids(loaded: Any, adapters: Iterable[str]) -> dict[str, int]:
    """The numbers of adapters in the answer of llama.cpp's server to `GET /lora-adapters`, by their files' names.

    Raises:
        ValueError: if an adapter is not loaded, or twice, or applied to requests that name none.
    """
    found: dict[str, list[int]] = {}
    applied = []
    for one in loaded:
        path = PureWindowsPath(one["path"]) if "\\" in one["path"] else PurePosixPath(one["path"])
        found.setdefault(path.stem, []).append(one["id"])
        if one.get("scale"):
            applied.append(path.stem)
    for name in adapters:
        if len(found.get(name, ())) != 1:
            raise ValueError(
                f"llama.cpp's server has {len(found.get(name, ()))} adapters of the name {name}; expected one, from "
                f"--lora-scaled {name}.gguf:0. It has: {', '.join(sorted(found)) or 'none'}."
            )
        if name in applied:
            raise ValueError(
                f"llama.cpp's server applies the adapter {name} to requests for other models, too, whatever "
                f"--lora-init-without-apply says; start it with --lora-scaled {name}.gguf:0, and the others alike."
            )
    return {name: found[name][0] for name in adapters}


def application(arguments: argparse.Namespace) -> TRexMiddleware:
    """The middleware in front of a proxy for the server that the command line names."""
    upstream = Proxy(arguments.upstream)
    options = {"name": arguments.name, "tokenizer": arguments.tokenizer, "chat_template": arguments.chat_template}
    options |= {"max_bytes": arguments.max_bytes, "adapters": False}
    if not arguments.llama_cpp:
        target: Any = ModelName(arguments.adapter_names)
        return TRexMiddleware(upstream, Routing(arguments.folder, target=target, **options))
    answer = httpx.get(arguments.upstream.rstrip("/") + "/lora-adapters", trust_env=False)
    answer.raise_for_status()
    routing = Routing(arguments.folder, **options)
    routing.target = LoraList(lora_ids(answer.json(), routing.router.adapters))
    return TRexMiddleware(upstream, routing)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m peft_trex.serve_router",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="exported folder; of its files only the router's are read")
    parser.add_argument("--upstream", required=True, help="the server's address, such as http://127.0.0.1:8000")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--name", default="trex", help="the model's name that clients ask for")
    parser.add_argument("--tokenizer", help="name or folder of the served model (default: as in the export)")
    parser.add_argument("--chat-template", type=Path, help="file, where the server has a template of its own")
    parser.add_argument("--adapter-names", default="{}", help="the server's model for an adapter, such as 'BASE:{}'")
    parser.add_argument("--llama-cpp", action="store_true", help="the server is llama.cpp's: adapters are numbers")
    parser.add_argument("--max-bytes", type=int, default=MOST_BYTES, help="the longest body that is read")
    arguments = parser.parse_args(given)
    try:
        app = application(arguments)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise SystemExit(f"{error}") from error
    uvicorn.run(app, host=arguments.host, port=arguments.port, lifespan="off", log_level="warning")


if __name__ == "__main__":
    main()
