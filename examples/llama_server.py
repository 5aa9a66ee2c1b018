"""llama.cpp's server, as the package xllamacpp carries it, with a base model and LoRA adapters for who asks for them.

    python examples/llama_server.py PORT THREADS BASE.gguf ADAPTER.gguf ...

It stands for `llama-server -m BASE.gguf --lora-scaled ADAPTER.gguf:0,... -c 8192 -np 4 -ctk f32 -ctv f32`, where that
is not at hand. Runs until it is stopped.
"""

from __future__ import annotations

import signal
import sys

import xllamacpp

port, threads, base, *adapters = sys.argv[1:]
options = xllamacpp.CommonParams()
options.port, options.model.path, options.n_ctx, options.n_parallel = int(port), base, 8192, 4
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = int(threads)
# It is float16 by default, which gives other logits.
options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 0.0) for adapter in adapters]
# The server lives as long as the object does.
server = xllamacpp.Server(options)
print(f"listening at {server.listening_address}", flush=True)
signal.pause()
