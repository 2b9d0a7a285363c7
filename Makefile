PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help train test test-all tables check lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

KERNELS := $(wildcard src/linvision/ops/backends/cpp/CMakeLists.txt src/linvision/ops/backends/cpp/kernels/*)

# One environment serves every target; it is made again only when pyproject.toml or the C++ kernels change.
$(VENV)/.installed: pyproject.toml $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

train: $(VENV)/.installed ## watch a ViL learn real handwriting (scikit-learn's digits; about 2 minutes on 2 cores)
	$(BIN)/linvision train --data digits

# A process a core, and no more than fit into memory; whoever is done takes tests from the others.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test: $(VENV)/.installed ## run the tests (4 minutes at most on 2 cores)
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed ## run all tests, the long ones too
	$(PYTEST)

tables: $(VENV)/.installed ## count the models anew for linvision models (half a minute)
	$(BIN)/python benchmarks/count_models.py

lint: $(VENV)/.installed ## formatting, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint test-all ## everything that must pass before a change lands

format: $(VENV)/.installed ## rewrite the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
