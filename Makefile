# Every target does the setup it needs. You need Python 3.11, make and a C compiler.
#
# GPU=1 selects the CUDA build, GPU=0 the CPU build. Without GPU=, the build in .venv is used; a new .venv gets CUDA if
# nvidia-smi works, otherwise the CPU build.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
IN_VENV := $(or $(shell cat $(VENV)/.build 2>/dev/null),$(if $(wildcard $(READY)),cpu))
ifeq ($(GPU),)
BUILD := $(or $(IN_VENV),$(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu))
else
BUILD := $(if $(filter-out 0,$(GPU)),cuda,cpu)
endif
LOCK := deploy/lock/$(BUILD).lock
LOCKS := $(addprefix deploy/lock/,cpu.lock image.lock cuda.lock image-cuda.lock)
PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-deps
CONFIG ?= deploy/configs/demo.yaml
ADDRESS ?= http://127.0.0.1:8265

.PHONY: help setup check format test test-all docs audit verify-gpu bench bench-rollouts bench-rollouts-full bench-capacity bench-staleness bench-trainer chaos demo submit image up down verify-compose demo-models demo-trace lock browser clean
.DEFAULT_GOAL := help

help:  ## Print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 21

setup: $(READY)  ## Install the environment in .venv from the lock file (2-3 minutes, 3.5 GB; with CUDA 5-10 minutes, 9.4 GB)

# If .venv has the other build, it is created again: both builds install the module vllm.
$(READY): $(LOCK) pyproject.toml $(if $(filter-out $(BUILD),$(IN_VENV)),other-build)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; name another with: make PYTHON=..." >&2; exit 1; }
	$(if $(filter cuda,$(BUILD)),@$(PYTHON) deploy/lock/driver.py)
	$(if $(filter-out $(BUILD),$(IN_VENV)),@echo "$(VENV) has the $(IN_VENV) build; creating it again" && rm -rf $(VENV))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	echo $(BUILD) > $(VENV)/.build
	@echo "installing the pinned packages of $(LOCK) ($(if $(filter cuda,$(BUILD)),5-10 minutes,2-3 minutes))"
	$(PIP_INSTALL) -r $(LOCK) $(if $(filter cuda,$(BUILD)),-c deploy/lock/cuda-constraints.txt)
	$(PIP_INSTALL) --no-build-isolation -e .
	touch $@

.PHONY: other-build
other-build:

check: $(READY)  ## Check lint, format, types, import contracts and known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m deploy.lock.audit $(LOCKS)

format: $(READY)  ## Apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two processes. tests/conftest.py assigns fixtures that only one of them may create, such as engines, and runs the slowest
# tests first.
WORKERS ?= 2
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -rs

test: $(READY)  ## Run all tests except the slow ones, with real engines (about 12 minutes on two cores)
	@$(MAKE) --no-print-directory browser || echo "no browser: the page's tests are skipped" >&2
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)  ## Run all tests: also several nodes, killed processes and whole runs, one at a time; more examples per property
	@$(MAKE) --no-print-directory browser || echo "no browser: the page's tests are skipped" >&2
	$(PYTEST) --hypothesis-profile thorough -m "not slow" $(ARGS)
	$(BIN)/pytest -rs -m slow $(ARGS)

bench: bench-rollouts bench-capacity bench-trainer bench-staleness  ## Run all benchmarks but the full rollouts; writes docs/benchmarks (under 30 minutes on an idle machine)

bench-rollouts: $(READY)  ## Measure rollouts with three policies (under 15 minutes)
	$(BIN)/python -m tests.benchmarks.rollouts --quick $(ARGS)

bench-rollouts-full: $(READY)  ## Measure rollouts for all policies, batch sizes, lengths and model pairs (more than an hour)
	$(BIN)/python -m tests.benchmarks.rollouts --full $(ARGS)

bench-capacity: $(READY)  ## Measure how many engines one controller can keep busy (about 4 minutes)
	$(BIN)/python -m tests.benchmarks.capacity $(ARGS)

bench-staleness: $(READY)  ## Measure time and accuracy of collecting one step ahead (about 5 minutes)
	$(BIN)/python -m tests.benchmarks.staleness $(ARGS)

bench-trainer: $(READY)  ## Measure loss, weight sync and a whole step compared with TRL (under 10 minutes)
	$(BIN)/python -m tests.benchmarks.trainer $(ARGS)

verify-gpu: $(READY)  ## Check the GPU code on this machine's GPUs; writes docs/benchmarks/gpu.json (up to 10 minutes per part)
	$(BIN)/python -m tests.gpu $(ARGS)

chaos: $(READY)  ## Kill and stop processes of demo runs and fill their disk; check that each run ends correctly (about 40 minutes)
	$(BIN)/python -m tests.chaos $(ARGS)

docs: $(READY)  ## Build the documentation in build/docs; warnings are errors, nothing is downloaded
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going --builder html docs build/docs

audit: $(READY)  ## Check pinned packages for known vulnerabilities; says so if the database can't be reached
	$(BIN)/python -m deploy.lock.audit $(LOCKS) $(ARGS)

demo: $(READY)  ## Distill the demo student and print the table (a few minutes)
	$(BIN)/adaswitch train deploy/configs/demo.yaml $(ARGS)

submit: $(READY)  ## Run CONFIG as a job on the Ray cluster at ADDRESS; ARGS="--set a.b=c"
	$(BIN)/python -m deploy.cluster.submit $(CONFIG) --address $(ADDRESS) $(ARGS)

# Containers. NETWORK=host if Docker has no bridge; GPU=1 with NVIDIA's container toolkit.
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
NETWORK ?= bridge
COMPOSE_FILES = -f deploy/docker/docker-compose.yml -f deploy/docker/docker-compose.$(NETWORK:bridge=override).yml $(if $(filter-out 0,$(GPU)),-f deploy/docker/docker-compose.nvidia.yml)
COMPOSE_UP = $(COMPOSE) -p adaswitch --env-file deploy/.env $(COMPOSE_FILES) $(if $(PROFILE),--profile $(PROFILE))

deploy/.env:
	@umask 077 && echo "ADASWITCH_INSPECTOR_TOKEN=$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" > $@

image: deploy/.env  ## Build the container image
	$(COMPOSE_UP) build head

up: image  ## Start Ray, the inspector and a run of CONFIG in containers; PROFILE=monitoring adds Prometheus and Grafana
	CONFIG=$(CONFIG) ARGS='$(ARGS)' $(COMPOSE_UP) up --detach
	@echo "the run: $(COMPOSE_UP) logs --follow job"
	@echo "inspector: http://127.0.0.1:8642, its token is in deploy/.env"

down: deploy/.env  ## Stop and remove the containers; keeps the runs (ARGS=--volumes removes them too)
	$(COMPOSE_UP) down $(ARGS)

verify-compose:  ## Check the containers: build, start, run, inspect, stop
	deploy/docker/verify-compose.sh

demo-models: $(READY)  ## Train the demo's models again (about 5 minutes)
	$(BIN)/python -m deploy.demo.make_models --out deploy/demo/models

demo-trace: $(READY)  ## Record again the short demo run for the web page's tests (about a minute)
	$(BIN)/python -m tests.data.record_demo

lock: $(READY)  ## Resolve pyproject.toml into all files in deploy/lock (ARGS=cuda.lock: only that one)
	$(BIN)/python -m deploy.lock.resolve $(ARGS)

browser: $(READY)  ## Install a browser for the web page's tests: Debian's if apt-get works, otherwise Playwright's
	@$(BIN)/python -m tests.support.browser || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) || timeout 300 $(BIN)/playwright install --with-deps chromium

clean:  ## Remove the environment and all caches; keeps the runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
