# SISTA: `make demo` and `make test` do everything on a fresh machine; a virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# the newest encoder of the demo
DEMO = $$(ls -t runs/demo/*/checkpoints/best.ckpt | head -1)
# a file stays on one worker, so that what its tests share is drawn once
PYTEST := $(BIN)/python -m pytest --dist loadfile

.PHONY: help demo test test-slow test-all lint format bench docs docker clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(BIN)/.ready  ## draw a phantom, pre-train SISTA on it, find diseases by words and by few labels
	$(BIN)/sista fit --config pretrain.yaml --name demo
	$(BIN)/sista test --config zeroshot_chexpert.yaml --name demo-words --model.weights $(DEMO)
	$(BIN)/sista fit --config cls_chexpert.yaml --name demo-labels --model.weights $(DEMO) --data.label_fraction 0.1 \
		--then test --config cls_chexpert.yaml --name demo-labels
	$(BIN)/sista list runs --match demo

test: $(BIN)/.ready  ## the default tests, minutes on two cores
	$(PYTEST) -n 2

test-slow: $(BIN)/.ready  ## the slow ones alone: every configuration through fit and test, kills, two processes
	$(PYTEST) -n 2 --dist worksteal -m "slow and not gpu and not study"

test-all: $(BIN)/.ready  ## all of them, with coverage
	$(BIN)/python -m coverage erase
	$(PYTEST) -n 2 -m "not gpu and not study" --cov --cov-report=term

lint: $(BIN)/.ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src tasks

format: $(BIN)/.ready  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BIN)/.ready  ## speed as ratios: the losses, the data
	$(BIN)/sista bench step
	$(BIN)/sista bench data

docs: $(BIN)/.ready  ## build the documentation into build/site: no network needed, its reference made from the code
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docker: ## build the image
	docker build --file docker/Dockerfile --tag sista .

clean:  ## remove the environment and all that was made; runs and datasets stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .coverage*
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.egg-info' -prune -exec rm -rf {} +
