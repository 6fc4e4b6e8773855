# Two commands do everything on a bare clone: `make serve` and `make test`.
#   make serve MODEL=google/flan-t5-small PORT=8000 GRPC_PORT=50051 ARGS="--max-running-sequences 32"
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
VLLM_LOG ?= .test-vllm.log
MODEL ?=
PORT ?= 8000
GRPC_PORT ?= 50051
ARGS ?=
PYTEST_ARGS ?=
PIP_ARGS ?=
BIN := $(VENV)/bin
# What an installation is made from: the engine's kernels are compiled by it, where there is a C compiler.
SOURCES := pyproject.toml $(wildcard serve/engine/native/*.[ch]) serve/engine/native/build.py serve/engine/native/hook.py

.PHONY: serve venv test test-main test-vllm lint format protos docs smoke image image-test clean

serve: $(VENV)/.serve-installed
	$(BIN)/flan-serve $(if $(MODEL),--model $(MODEL)) --port $(PORT) --grpc-port $(GRPC_PORT) $(ARGS)

venv: $(VENV)/.installed

# The two suites have an environment each, and run side by side: the second one is installed while the first one runs.
test:
	@echo "the tests with vLLM run beside these; what they say is shown at the end, and meanwhile in $(VLLM_LOG)"
	@$(MAKE) --no-print-directory test-vllm >$(VLLM_LOG) 2>&1 & vllm=$$!; \
	trap 'kill $$vllm 2>/dev/null' INT TERM; \
	main=0; $(MAKE) --no-print-directory test-main || main=$$?; \
	vllm_exit=0; wait $$vllm || vllm_exit=$$?; \
	echo "the tests with vLLM:"; cat $(VLLM_LOG); \
	exit $$((main != 0 || vllm_exit != 0))

test-main: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

# vLLM and Triton have an environment of their own: so the tests above prove that the package does without them.
ifeq ($(shell uname -sm),Linux x86_64)
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -o cache_dir=.pytest_cache/vllm -m "vllm or triton" $(PYTEST_ARGS)
else
test-vllm:
	@echo "vLLM's CPU wheel exists for Linux x86_64 only: its tests are left out on $(shell uname -sm)"
endif

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/.installed
	$(BIN)/python -m protos.generate

docs: $(VENV)/.installed
	$(BIN)/python -m docs.generate

smoke: $(VENV)/.installed
	$(BIN)/flan-finetune train finetune/configs/smoke.toml

image:
	deploy/build-image.sh

# Builds the image and runs it as Kubernetes would; needs root and
# apt-get install -y --no-install-recommends buildah runc podman mmdebstrap conmon
image-test: $(VENV)/.installed
	$(BIN)/pytest -m container tests/deploy

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(VLLM_LOG) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Only what serving needs; a later `make test` adds the rest to the same folder.
$(VENV)/.serve-installed: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e .
	touch $@

$(VENV)/.installed: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[finetune,loadtests,dev]"
	touch $@ $(VENV)/.serve-installed

# The CPU wheel wants three packages that a text model does not need and whose builds do not fit this torch.
$(VLLM_VENV)/.installed: $(SOURCES)
	test -d $(VLLM_VENV) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[loadtests,dev,dev-vllm]"
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
