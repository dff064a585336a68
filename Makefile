# Every target creates the virtual environment and installs what is locked, when that is needed.
#   make serve [MODEL=PATH] [PORT=8000]            the feature server; both models that ship by default
#   make test                                      all tests
#   make test-gpu                                  tests that need a CUDA device
#   make check                                     lint, format, types
#   make train-demo IMAGES=DIR [OUTPUT=runs/demo]  refine the small pre-trained backbone that ships
#   make kernel-resources                          renew benchmarks/results/kernel_resources_sm90.csv
#   make lock                                      renew requirements.lock
#   make clean                                     remove the environment and caches

VENV ?= .venv
# The first interpreter that runs (a version manager's shim may exist and not run) and is supported.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && { echo $$p; break; }; \
	done)
# The raw one beside the refined one, so that the playground can compare them.
MODELS = $(if $(MODEL),--model $(MODEL),--model models/demo --model raw=models/demo-pretrained)
HOST ?= 127.0.0.1
PORT ?= 8000
OUTPUT ?= runs/demo

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST_TRITON := build/triton-3.6.0
RESOURCES := benchmarks/results/kernel_resources_sm90.csv

.DEFAULT_GOAL := help
.PHONY: help serve test test-gpu check train-demo kernel-resources lock clean

help:
	@sed -n 's/^#   //p' Makefile

$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 here: install one, or give it as PYTHON=" >&2; exit 2; }
	@echo "installing PyTorch and the rest into $(VENV): about 6 GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

serve: $(INSTALLED)
	$(BIN)/python -m service $(MODELS) --host $(HOST) --port $(PORT)

# Triton decides at import whether it interprets: what runs device code on the CPU is a process of its own.
test: $(INSTALLED) $(OLDEST_TRITON)
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/device

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# The lower end of the range in pyproject.toml: change both together, and OLDEST in tests/kernels/test_aot.py.
$(OLDEST_TRITON): requirements-oldest-triton.lock | $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target $@ \
		-r requirements-oldest-triton.lock
	touch $@

kernel-resources: $(INSTALLED) $(OLDEST_TRITON)
	$(BIN)/python -m tests.kernels.aot.harness --output build/newest.csv
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m tests.kernels.aot.harness --output build/oldest.csv
	{ cat build/newest.csv; tail -n +2 build/oldest.csv; } > $(RESOURCES)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

train-demo: $(INSTALLED)
	@test -n "$(IMAGES)" || { echo "give a folder of photographs: make train-demo IMAGES=DIR" >&2; exit 2; }
	$(BIN)/python -m trainer --recipe demo --images "$(IMAGES)" --output "$(OUTPUT)"

lock:
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv
	build/uv/bin/uv pip compile pyproject.toml --extra dev --universal --upgrade --generate-hashes \
		--no-header --no-annotate --python-version 3.11 --output-file requirements.lock

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
