# Every target does the set-up it needs. Needed beforehand: Python 3.11, make, a C compiler.
#
# GPU=1 takes the CUDA build, GPU=0 the CPU build. Without GPU= it is the one that .venv was made with last; for a new
# .venv CUDA where nvidia-smi answers, else the CPU's.
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

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## The environment in .venv, from the pinned lock file (2-3 minutes, 3.5 GB; with CUDA 5-10 minutes, 9.4 GB)

# The environment is made anew where it holds the other build: both bring the module vllm.
$(READY): $(LOCK) pyproject.toml $(if $(filter-out $(BUILD),$(IN_VENV)),other-build)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; name another with: make PYTHON=..." >&2; exit 1; }
	$(if $(filter cuda,$(BUILD)),@$(PYTHON) deploy/lock/driver.py)
	$(if $(filter-out $(BUILD),$(IN_VENV)),@echo "$(VENV) has the $(IN_VENV) build: making it anew" && rm -rf $(VENV))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	echo $(BUILD) > $(VENV)/.build
	@echo "installing the pinned packages of $(LOCK) ($(if $(filter cuda,$(BUILD)),5-10 minutes,2-3 minutes))"
	$(PIP_INSTALL) -r $(LOCK) $(if $(filter cuda,$(BUILD)),-c deploy/lock/cuda-constraints.txt)
	$(PIP_INSTALL) --no-build-isolation -e .
	touch $@

.PHONY: other-build
other-build:

check: $(READY)  ## Lint, format, types, import contracts, known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m deploy.lock.audit $(LOCKS)

format: $(READY)  ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two processes. What only one of them may have, such as engines, and what takes longest is sorted in tests/conftest.py.
WORKERS ?= 2
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -rs

test: $(READY)  ## The tests but for the slow ones, on real engines (under 10 minutes on two cores)
	@$(MAKE) --no-print-directory browser || echo "no browser: the page's tests are skipped" >&2
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)  ## All tests: also several nodes, killed processes and whole runs, one at a time; properties with more examples
	@$(MAKE) --no-print-directory browser || echo "no browser: the page's tests are skipped" >&2
	$(PYTEST) --hypothesis-profile thorough -m "not slow" $(ARGS)
	$(BIN)/pytest -rs -m slow $(ARGS)

bench: bench-rollouts bench-capacity bench-trainer bench-staleness  ## Measure everything; writes docs/benchmarks (under 30 minutes on a quiet machine)

bench-rollouts: $(READY)  ## Measure the rollouts (under 15 minutes)
	$(BIN)/python -m tests.benchmarks.rollouts --quick $(ARGS)

bench-rollouts-full: $(READY)  ## The same for all policies, batches, lengths and pairs (more than an hour)
	$(BIN)/python -m tests.benchmarks.rollouts --full $(ARGS)

bench-capacity: $(READY)  ## Measure how many engines one controller keeps busy (about 4 minutes)
	$(BIN)/python -m tests.benchmarks.capacity $(ARGS)

bench-staleness: $(READY)  ## Measure what collecting one step ahead buys and costs (about 5 minutes)
	$(BIN)/python -m tests.benchmarks.staleness $(ARGS)

bench-trainer: $(READY)  ## Measure loss, weight sync and a whole step beside TRL's (under 10 minutes)
	$(BIN)/python -m tests.benchmarks.trainer $(ARGS)

verify-gpu: $(READY)  ## Try the GPU paths on this machine's GPUs and write docs/benchmarks/gpu.json (up to 10 minutes a part)
	$(BIN)/python -m tests.gpu $(ARGS)

chaos: $(READY)  ## Kill, stop and starve the demo's processes and see that each run ends right (about 40 minutes)
	$(BIN)/python -m tests.chaos $(ARGS)

docs: $(READY)  ## The documentation, into build/docs; warnings are errors, nothing is fetched
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going --builder html docs build/docs

audit: $(READY)  ## Known vulnerabilities of the pinned packages; says so where no service can be asked
	$(BIN)/python -m deploy.lock.audit $(LOCKS) $(ARGS)

demo: $(READY)  ## Distil the demo student and print the table (a few minutes)
	$(BIN)/adaswitch train deploy/configs/demo.yaml $(ARGS)

submit: $(READY)  ## Run CONFIG as a job on the Ray cluster at ADDRESS; ARGS="--set a.b=c"
	$(BIN)/python -m deploy.cluster.submit $(CONFIG) --address $(ADDRESS) $(ARGS)

# Containers. NETWORK=host where the engine has no bridge; GPU=1 with NVIDIA's container toolkit.
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
NETWORK ?= bridge
COMPOSE_FILES = -f deploy/docker/docker-compose.yml -f deploy/docker/docker-compose.$(NETWORK:bridge=override).yml $(if $(filter-out 0,$(GPU)),-f deploy/docker/docker-compose.nvidia.yml)
COMPOSE_UP = $(COMPOSE) -p adaswitch --env-file deploy/.env $(COMPOSE_FILES) $(if $(PROFILE),--profile $(PROFILE))

deploy/.env:
	@umask 077 && echo "ADASWITCH_INSPECTOR_TOKEN=$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" > $@

image: deploy/.env  ## The container image
	$(COMPOSE_UP) build head

up: image  ## Ray, the inspector and a run of CONFIG in containers; PROFILE=monitoring adds Prometheus and Grafana
	CONFIG=$(CONFIG) ARGS='$(ARGS)' $(COMPOSE_UP) up --detach
	@echo "the run: $(COMPOSE_UP) logs --follow job"
	@echo "inspector: http://127.0.0.1:8642, its token is in deploy/.env"

down: deploy/.env  ## Stop and remove the containers; runs stay (ARGS=--volumes removes them too)
	$(COMPOSE_UP) down $(ARGS)

verify-compose:  ## Build, start, run, look, stop: everything about the containers, for real
	deploy/docker/verify-compose.sh

demo-models: $(READY)  ## Make the demo's models again (about 5 minutes)
	$(BIN)/python -m deploy.demo.make_models --out deploy/demo/models

demo-trace: $(READY)  ## Record anew the short demo run that the page's tests look at (about a minute)
	$(BIN)/python -m tests.data.record_demo

lock: $(READY)  ## Resolve pyproject.toml anew into all files of deploy/lock (ARGS=cuda.lock: one of them)
	$(BIN)/python -m deploy.lock.resolve $(ARGS)

browser: $(READY)  ## A browser for the page's tests: Debian's where apt-get works, else Playwright's
	@$(BIN)/python -m tests.support.browser || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) || timeout 300 $(BIN)/playwright install --with-deps chromium

clean:  ## Remove the environment and all caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
