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
.PHONY: help setup quickstart train train-ddp train-raw-ddp doctor lab parity crash-test bench explain scaling bench-report bench-serve soak kaggle hub push deploy-space deploy-page verify predict serve test test-all lint clean

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

# NAME may stand in the environment (WSL puts the host's there): only what was given to make counts.
lab: $(VENV)/.requirements ## Break distributed training on purpose and see the symptom: docs/lab.md (NAME=no_set_epoch, else all)
	@$(PY) -m pipeline.lab $(if $(filter command,$(origin NAME)),$(NAME),--all) $(ARGS)

parity: $(VENV)/.requirements ## Prove that entry, processes and accumulation change nothing: benchmarks/parity.md
	@$(PY) -m benchmarks.parity $(ARGS)

crash-test: $(VENV)/.requirements ## Kill a run 26 times and show that it ends the same: benchmarks/crash_test.md
	@$(PY) -m benchmarks.crash_test $(ARGS)

bench: $(VENV)/.requirements ## One process against two, Trainer against raw, both against a plain loop (BENCH=quick: under 3 minutes)
	@$(PY) -m benchmarks.bench $(if $(filter quick,$(BENCH)),--quick) $(ARGS)

explain: $(VENV)/.requirements ## Where the missing speed-up went, part by part, what would help, and more ranks (ARGS="--dataset ...")
	@$(PY) -m benchmarks.explain $(ARGS)

scaling: $(VENV)/.requirements ## Predicted efficiency for 2 to 64 ranks, from what explain measured (ARGS="--faster 200")
	@$(PY) -m benchmarks.scaling $(ARGS)

bench-report: $(VENV)/.requirements ## The pages of speed, and the figures in README and docs, made of benchmarks/results/*.json
	@$(PY) -m benchmarks.bench_report $(ARGS) && $(PY) -m benchmarks.figures

bench-serve: $(VENV)/.requirements ## The service beside FastAPI + pipeline, LitServe and mosec (MODEL= ARGS="--quick --dataset ...")
	@$(PY) -m benchmarks.bench_serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

soak: $(VENV)/.requirements ## The service under load while it is swapped, broken and killed (SOAK=full: every fault)
	@$(PY) -m benchmarks.soak $(if $(filter full,$(SOAK)),--full) $(ARGS)

# USER is also the name one has here, in the environment: only what was given to make counts.
kaggle: $(VENV)/.requirements ## Push the notebook for 2x T4 to Kaggle (USER=name HUB_REPO=user/name; ARGS=--dry only checks it)
	@$(PY) -m benchmarks.kaggle $(if $(filter command,$(origin USER)),--user "$(USER)") $(if $(HUB_REPO),--set "HUB_REPO=$(HUB_REPO)") $(ARGS)

hub: $(VENV)/.requirements ## A Hub on this machine, in the foreground (ARGS="--port 8009")
	@$(PY) -m pipeline.local_hub $(ARGS)

push: $(VENV)/.requirements ## Publish a finished run (RUN=outputs/ag_news REPO=user/name)
	@$(PY) -m pipeline.hub $(if $(RUN),--run "$(RUN)") $(if $(REPO),--repo "$(REPO)") $(ARGS)

verify: $(VENV)/.requirements ## Pull a release, score it again, say whether its card is true (REPO=user/name REVISION=v1)
	@$(PY) -m pipeline.verify $(if $(REPO),--repo "$(REPO)") $(if $(REVISION),--revision "$(REVISION)") $(ARGS)

deploy-space: $(VENV)/.requirements ## A Docker Space that answers curl (SPACE=user/api MODEL=user/repo REVISION=tag ARGS="--private")
	@$(PY) -m pipeline.deploy.space $(if $(SPACE),--space "$(SPACE)") $(if $(MODEL),--model "$(MODEL)") $(if $(REVISION),--revision "$(REVISION)") $(ARGS)

deploy-page: $(VENV)/.requirements ## A free Space: the page, with the model in the visitor's browser (SPACE=user/page MODEL=user/repo REVISION=tag)
	@$(PY) -m pipeline.deploy.page $(if $(SPACE),--space "$(SPACE)") $(if $(MODEL),--model "$(MODEL)") $(if $(REVISION),--revision "$(REVISION)") $(ARGS)

predict: $(VENV)/.requirements ## Label a file without a server (MODEL=, INPUT=, OUTPUT=)
	@$(PY) -m pipeline.predict $(if $(MODEL),--model "$(MODEL)") $(if $(INPUT),--input "$(INPUT)") $(if $(OUTPUT),--output "$(OUTPUT)") $(ARGS)

serve: $(VENV)/.requirements ## The API and its page (MODEL=user/repo REVISION=tag-or-sha)
	@$(PY) -m serve $(if $(MODEL),--model "$(MODEL)") $(if $(REVISION),--revision "$(REVISION)") $(ARGS)

test: $(VENV)/.requirements-dev ## The tests, 15 to 40 minutes on 2 cores
	@$(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(VENV)/.requirements-dev ## All tests, the slow ones and every kill of the crash test too
	@$(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)
	@$(PY) -m pytest -m slow $(ARGS) || test $$? = 5 # 5: ARGS left no slow test

lint: $(VENV)/.requirements-dev ## ruff and mypy
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy pipeline serve benchmarks

clean: ## Remove what was built and fetched here (not outputs/)
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
