# Two commands do everything on a bare clone: `make serve` and `make test`.
#   make serve MODEL=google/flan-t5-small PORT=8000 GRPC_PORT=50051 ARGS="--max-running-sequences 32"
PYTHON ?= python3
VENV ?= .venv
MODEL ?=
PORT ?= 8000
GRPC_PORT ?= 50051
ARGS ?=
PYTEST_ARGS ?=
PIP_ARGS ?=
BIN := $(VENV)/bin

.PHONY: serve venv test lint format protos smoke image image-test clean

serve: $(VENV)/.serve-installed
	$(BIN)/flan-serve $(if $(MODEL),--model $(MODEL)) --port $(PORT) --grpc-port $(GRPC_PORT) $(ARGS)

venv: $(VENV)/.installed

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

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

smoke: $(VENV)/.installed
	$(BIN)/flan-finetune train finetune/configs/smoke.toml

image:
	deploy/build-image.sh

# Builds the image and runs it as Kubernetes would; needs root and
# apt-get install -y --no-install-recommends buildah runc podman mmdebstrap conmon
image-test: $(VENV)/.installed
	$(BIN)/pytest -m container tests/deploy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Only what serving needs; a later `make test` adds the rest to the same folder.
$(VENV)/.serve-installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e .
	touch $@

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e ".[finetune,loadtests,dev]"
	touch $@ $(VENV)/.serve-installed
