# make demo and make test are all a newcomer needs; each makes its own virtual environment the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP_RUN := $(VENV)/.installed
STAMP_DEV := $(VENV)/.installed-dev
# torch comes first and alone: under a constraint that names it exactly, pip takes the build this machine offers.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-slow check format benchmark clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP_RUN)  ## Train a small DeepSeek-V3 with MTP (four minutes), decode, write runs/demo/report.html.
	$(BIN)/nextn demo

test: $(STAMP_DEV)  ## Check style, types and imports, then run the tests.
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest --numprocesses 2

test-slow: $(STAMP_DEV)  ## Only the tests that take minutes.
	$(BIN)/python -m pytest -m slow

check: $(STAMP_DEV)  ## Lint, format, types, import directions.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP_DEV)  ## Rewrite the sources as ruff formats them.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(STAMP_RUN)  ## Cost of a training step: ours beside transformers, K = 0..4, three vocabularies (ten minutes).
	$(BIN)/python benchmarks/train_step.py --profile

clean:  ## Remove the virtual environment and caches; runs stay.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build src/*.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP_RUN): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(STAMP_DEV): $(STAMP_RUN)
	$(PIP) --editable '.[dev]'
	@touch $@
