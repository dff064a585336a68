# Every target creates the virtual environment and installs what is locked, when that is needed.
#   make serve [MODEL=PATH] [PORT=8000]            the feature server; both models that ship by default
#   make test                                      all tests
#   make test-gpu                                  tests that need a CUDA device
#   make test-deploy                               tests that need a Docker engine: images, compose
#   make up [GPU=1] | make down                    the service in containers, with Redis; Prometheus and Grafana with OBS=1
#   make images                                    the images vit-refinery-service and vit-refinery-trainer
#   make model-image MODEL=PATH TAG=NAME:TAG       an artifact as an image, to be mounted as a volume
#   make check                                     lint, format, types
#   make train-demo IMAGES=DIR [OUTPUT=runs/demo]  refine the small pre-trained backbone that ships
#   make kernel-resources                          renew benchmarks/results/kernel_resources_sm90.csv
#   make lock                                      renew requirements.lock, docker/*.lock and requirements-deploy.lock
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
DEPLOY_TOOLS := build/deploy-tools
OLDEST_TRITON := build/triton-3.6.0
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# docker-compose is version 1, which builds without BuildKit unless told. Files that are named replace those that Compose
# would find by itself, so that the override has to be named too.
COMPOSE = DOCKER_BUILDKIT=1 VIT_REFINERY_REVISION=$$(git rev-parse HEAD) $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose) \
	--file compose.yaml $(if $(GPU),--file compose.gpu.yaml) $(addprefix --file ,$(wildcard compose.override.yaml)) \
	$(if $(OBS),--profile obs)
DOCKER_BUILD = DOCKER_BUILDKIT=1 docker build \
	$(if $(VIT_REFINERY_PYTHON_IMAGE),--build-arg PYTHON_IMAGE="$(VIT_REFINERY_PYTHON_IMAGE)") \
	$(if $(VIT_REFINERY_TORCH_INDEX),--build-arg TORCH_INDEX="$(VIT_REFINERY_TORCH_INDEX)") \
	--build-arg VERSION="$(VERSION)" --build-arg REVISION="$$(git rev-parse HEAD)" --build-arg CREATED="$$(date -u +%Y-%m-%dT%H:%M:%SZ)"
RESOURCES := benchmarks/results/kernel_resources_sm90.csv

.DEFAULT_GOAL := help
.PHONY: help serve test first-tests other-tests test-gpu test-deploy up down images model-image check train-demo kernel-resources lock clean

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

# Two processes of about the same length, on two cores. Each test runs on one thread (tests/conftest.py).
FIRST_TESTS := tests/service tests/examples $(wildcard tests/test_*.py)
OTHER_TESTS := $(filter-out tests/service/ tests/examples/,$(sort $(wildcard tests/*/)))

test: $(INSTALLED) $(OLDEST_TRITON) $(DEPLOY_TOOLS)/.installed
	$(MAKE) --no-print-directory --jobs=2 --output-sync=line first-tests other-tests

first-tests:
	$(BIN)/python -m pytest -p no:cacheprovider $(FIRST_TESTS)

# Triton decides at import whether it interprets: what runs device code on the CPU is a process of its own.
other-tests:
	$(BIN)/python -m pytest -p no:cacheprovider $(OTHER_TESTS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -p no:cacheprovider tests/kernels/device

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

test-deploy: $(INSTALLED)
	$(BIN)/python -m pytest --engine tests/deploy/engine

up:
	$(COMPOSE) up --build --detach
	@echo
	@echo "A key, shown once:  docker compose run --rm keys new NAME"
	@echo "Then:               curl -H 'Authorization: Bearer KEY' http://$$($(COMPOSE) port service 8000)/info"

# With every profile: version 2 leaves containers of the others running, and then cannot remove their network.
down:
	$(COMPOSE) --profile obs --profile train down

images:
	for target in service trainer; do \
		$(DOCKER_BUILD) --file docker/Dockerfile --target $$target --tag vit-refinery-$$target:$(VERSION) \
			--tag vit-refinery-$$target:$$(git rev-parse --short HEAD) . || exit 1; \
	done

model-image:
	@test -f "$(MODEL)/refinery.json" && test -n "$(TAG)" || \
		{ echo "give an artifact and a name: make model-image MODEL=runs/first/refined TAG=vit-refinery-model:1" >&2; exit 2; }
	$(DOCKER_BUILD) --file docker/model.Dockerfile --tag "$(TAG)" "$(MODEL)"

# What tests/deploy starts; apart from $(VENV), since checkov pins what the service must not follow.
$(DEPLOY_TOOLS)/.installed: requirements-deploy.lock | $(INSTALLED)
	rm -rf $(DEPLOY_TOOLS)
	$(PYTHON) -m venv $(DEPLOY_TOOLS)
	$(DEPLOY_TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
		-r requirements-deploy.lock
	touch $@

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
	cp requirements.lock build/images.lock
	build/uv/bin/uv pip compile pyproject.toml --extra otel --extra tensorboard --universal --generate-hashes \
		--no-header --no-annotate --python-version 3.11 --output-file build/images.lock
	awk '/^[a-z]/ {heavy = /^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/} \
		{print > (heavy ? "docker/torch.lock" : "docker/rest.lock")}' build/images.lock
	build/uv/bin/uv pip compile requirements-deploy.in --universal --upgrade --generate-hashes \
		--no-header --no-annotate --python-version 3.11 --output-file requirements-deploy.lock

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
