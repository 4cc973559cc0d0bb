# Every command of the project. `make` or `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CONFIG ?= configs/ag_news.yaml
ARGS ?=
# A smaller torch without CUDA, from PyTorch's own index: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
.DEFAULT_GOAL := help
.PHONY: help setup quickstart train train-ddp train-raw-ddp doctor parity crash-test training-speed bench-serve soak hub push predict serve test test-all lint clean

help: ## List the targets
	@echo "DistriNews: fine-tune a text classifier on one process or many, publish it to the Hub, serve it from there."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-15s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); 3.11 or newer is needed. Name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 2; }

# One stamp a requirements file: pip runs only when it has changed.
$(VENV)/.requirements: $(VENV)/bin/python requirements.txt requirements-base.txt
	@echo "Installing the pinned requirements into $(VENV) ..."
	@$(if $(TORCH_INDEX),$(PIP) install --quiet --index-url $(TORCH_INDEX) "$$(grep ^torch requirements.txt)",true)
	@$(PIP) install --quiet -r requirements.txt
	@touch $@

$(VENV)/.requirements-dev: $(VENV)/.requirements requirements-dev.txt
	@$(PIP) install --quiet -r requirements-dev.txt
	@touch $@

setup: $(VENV)/.requirements ## Make .venv with the pinned requirements

quickstart: $(VENV)/.requirements ## The whole system once, on this machine: train, publish, prove, serve, ask
	@$(PY) -m pipeline.quickstart

train: $(VENV)/.requirements ## Trainer, one process (CONFIG=configs/ag_news.yaml ARGS="--epochs 1")
	@$(PY) -m pipeline.launch train $(CONFIG) $(ARGS)

train-ddp: $(VENV)/.requirements ## Trainer, two processes or one per GPU (CONFIG=, ARGS=)
	@$(PY) -m pipeline.launch train-ddp $(CONFIG) $(ARGS)

train-raw-ddp: $(VENV)/.requirements ## The hand-written DDP script, the same (CONFIG=, ARGS=)
	@$(PY) -m pipeline.launch train-raw-ddp $(CONFIG) $(ARGS)

doctor: $(VENV)/.requirements ## Examine a run before it is started (CONFIG=, LAUNCH=configs/accelerate/cpu2.yaml, ARGS=)
	@$(PY) -m pipeline.doctor $(CONFIG) $(if $(LAUNCH),--launch "$(LAUNCH)") $(ARGS)

parity: $(VENV)/.requirements ## Prove that entry, processes and accumulation change nothing: benchmarks/parity.md
	@$(PY) -m benchmarks.parity $(ARGS)

crash-test: $(VENV)/.requirements ## Kill a run 26 times and show that it ends the same: benchmarks/crash_test.md
	@$(PY) -m benchmarks.crash_test $(ARGS)

training-speed: $(VENV)/.requirements ## Trainer against raw, defaults against a plain loop, cost of checkpoints (ARGS="--dataset ...")
	@$(PY) -m benchmarks.training_speed $(ARGS)

bench-serve: $(VENV)/.requirements ## The service beside FastAPI + pipeline, LitServe and mosec (MODEL= ARGS="--quick --dataset ...")
	@$(PY) -m benchmarks.bench_serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

soak: $(VENV)/.requirements ## The service under load while it is swapped, broken and killed (SOAK=full: every fault)
	@$(PY) -m benchmarks.soak $(if $(filter full,$(SOAK)),--full) $(ARGS)

hub: $(VENV)/.requirements ## A Hub on this machine, in the foreground (ARGS="--port 8009")
	@$(PY) -m pipeline.local_hub $(ARGS)

push: $(VENV)/.requirements ## Publish a finished run (RUN=outputs/ag_news REPO=user/name)
	@$(PY) -m pipeline.hub $(if $(RUN),--run "$(RUN)") $(if $(REPO),--repo "$(REPO)") $(ARGS)

predict: $(VENV)/.requirements ## Label a file without a server (MODEL=, INPUT=, OUTPUT=)
	@$(PY) -m pipeline.predict $(if $(MODEL),--model "$(MODEL)") $(if $(INPUT),--input "$(INPUT)") $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

serve: $(VENV)/.requirements ## The API and its page (MODEL=user/repo REVISION=tag-or-sha)
	@$(PY) -m serve $(if $(MODEL),--model "$(MODEL)") $(if $(REVISION),--revision "$(REVISION)") $(ARGS)

test: $(VENV)/.requirements-dev ## The tests, some 15 minutes on 2 cores
	@$(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(VENV)/.requirements-dev ## All tests, with every kill of the crash test: some 45 minutes on 2 cores
	@$(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)
	@$(PY) -m pytest -m slow $(ARGS) || test $$? = 5 # 5: ARGS left no slow test

lint: $(VENV)/.requirements-dev ## ruff and mypy
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy pipeline serve benchmarks

clean: ## Remove what was built and fetched here (not outputs/)
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
