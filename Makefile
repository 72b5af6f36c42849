# The whole ritual is `make check test`. `make` alone prints this help.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNTIME ?= cpu

# demo
IMAGES ?=
MINUTES ?= 2

.PHONY: help setup demo demo-train test test-slow test-gpu test-scale check format proto baseline load bench soak fuzz image clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml runs/setup.sh
	@bash runs/setup.sh "$(PYTHON)" "$(VENV)" "$(RUNTIME),train,export,serve,dev,demo" torch "4 GB" 7
	@touch $@

# What the demo needs, without torch; nothing where everything is there.
$(VENV)/.ready-demo: pyproject.toml runs/setup.sh
	@[ $(VENV)/.ready -nt pyproject.toml ] && [ $(VENV)/.ready -nt runs/setup.sh ] || \
	  bash runs/setup.sh "$(PYTHON)" "$(VENV)" "$(RUNTIME),serve,demo" sklearn $(if $(filter gpu,$(RUNTIME)),"4 GB" 8,"300 MB" 2)
	@touch $@

setup: $(VENV)/.ready ## Create the environment in .venv with everything (says how much it downloads first)

demo: $(VENV)/.ready-demo ## Pictures → collection → gRPC answers, without torch. IMAGES=FOLDER for your own
	@$(BIN)/python runs/demo.py $(if $(IMAGES),--images "$(IMAGES)")

demo-train: $(VENV)/.ready ## Pictures → trained encoder → bundle → collection → gRPC answers. IMAGES=FOLDER, MINUTES=2
	@$(BIN)/python runs/demo.py --train --minutes $(MINUTES) $(if $(IMAGES),--images "$(IMAGES)")

test: $(VENV)/.ready ## The default tests (no GPU, under 6 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.ready ## Tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.ready ## Tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-scale: $(VENV)/.ready ## Tests on large inputs
	$(BIN)/python -m pytest -m scale

check: $(VENV)/.ready ## Format, lint, types, buf lint and breaking, generated documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/baseline.binpb
	$(BIN)/python -m runs.generate_api --check

format: $(VENV)/.ready ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/.ready ## Generate service/pb, service/openapi.json and docs/api.md from proto/
	$(BIN)/python runs/generate_proto.py
	$(BIN)/python -m runs.generate_api

baseline: $(VENV)/.ready ## At a release: the API that `make check` compares later ones with becomes today's
	$(BIN)/buf build proto --exclude-source-info -o proto/baseline.binpb

load: $(VENV)/.ready ## k6 searches a running server: COLLECTION=NAME ADDRESS=HOST:PORT and more, see deploy/k6/search.js
	$(BIN)/k6 run --no-usage-report --address "" deploy/k6/search.js

bench: $(VENV)/.ready ## Every benchmark (BENCH=--quick for a trial)
	for name in sop_objective train_step; do $(BIN)/python -m benchmarks.$$name $(BENCH) || exit 1; done
	for name in serve_search start collections nearest kill_collections kill_releases kill_server overload data_path alarms kill_training pretrain_small pretrain_tiny stabilisers; do \
	  $(BIN)/python -m benchmarks.$$name --out runs/out/$$name $(BENCH) || exit 1; done

soak: MINUTES = 30
soak: $(VENV)/.ready ## A server under everything at once; MINUTES=30
	$(BIN)/python -m benchmarks.soak --out runs/out/soak --minutes $(MINUTES) $(BENCH)

fuzz: $(VENV)/.ready ## A million damaged pictures, and calls that nobody means
	$(BIN)/python -m benchmarks.fuzz_pictures --out runs/out/fuzz_pictures $(BENCH)
	$(BIN)/python -m benchmarks.fuzz_calls --out runs/out/fuzz_calls $(BENCH)

image: ## Container image; VARIANT=cpu or cuda
	docker build --build-arg VARIANT=$(or $(VARIANT),cpu) -t likewise:$(or $(VARIANT),cpu) .

clean: ## Remove the environment and the demo's folder
	rm -rf $(VENV) .venv-demo demo
