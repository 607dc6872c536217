# Needs python3 and make, nothing else. Uses uv when it is there, because it is faster.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ifeq ($(shell uv --version >/dev/null 2>&1 && echo yes),yes)
  NEW_VENV = uv venv -q --allow-existing --python $(PYTHON) $(VENV)
  INSTALL = uv pip install -q --python $(BIN)/python
else
  # pip reads dependency groups from 25.1 on.
  NEW_VENV = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q --upgrade "pip>=25.1"
  INSTALL = $(BIN)/python -m pip install -q
endif

# uv trusts the certificates that the system trusts, as pip does.
export UV_SYSTEM_CERTS = true
# No test and no demo waits for LiteLLM's download of a price list, or leaves a cache in the home directory.
export LITELLM_LOCAL_MODEL_COST_MAP = True
export DSPY_CACHEDIR = $(CURDIR)/$(VENV)/dspy-cache

# Tests and benchmarks start processes, many of them: none compiles every package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-slow test-integration test-server test-rest test-nightly test-all lint format hooks docs pictures matrix lowest nightly dist bench imports services backends collector jaeger phoenix rotel kafka clean
help: ## show this
	@sed -n 's/^\([a-z -]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(VENV)/.demo ## run, evaluate and optimize a small program; see it in MLflow (no key, no network once installed)
	@$(BIN)/dspy-otel demo $(ARGS)

test: $(VENV)/.test ## the fast tests
	$(BIN)/python -m pytest -n auto $(ARGS)

test-slow: $(VENV)/.test ## the slow tests
	$(BIN)/python -m pytest -n auto -m "slow and not integration and not nightly" $(ARGS)

test-integration: $(VENV)/.neighbours ## the tests against real servers and in fresh processes
	$(BIN)/python -m pytest -n auto --dist loadfile -m "integration and not nightly" $(ARGS)

test-server: $(VENV)/.server ## LM calls against llama.cpp's server, joined to what it answered (gets 350 MB from PyPI, once)
	$(BIN)/python -m pytest -m integration tests/integration/test_llama_server.py tests/integration/test_examples.py $(ARGS)

# Many of them wait for a server or a process: one more at a time than there are cores; and in order of files, for those with
# few tests are long.
test-rest: $(VENV)/.neighbours ## the slow tests and the integration tests, together
	$(BIN)/python -m pytest -n $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)') --dist loadfile \
	  --no-loadscope-reorder -m "(slow or integration) and not nightly" $(ARGS)

test-nightly: $(VENV)/.neighbours ## the tests that take minutes each
	$(BIN)/python -m pytest -n 2 --dist loadfile -m nightly $(ARGS)

test-all: test test-rest ## all tests

lint: $(VENV)/.lint ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint ## let ruff mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.hooks ## run style and types before each commit (pre-commit)
	$(BIN)/pre-commit install

docs: $(VENV)/.docs ## the documentation as a site, in site/; a link that leads nowhere fails it
	$(BIN)/sphinx-build --quiet --fail-on-warning --fresh-env docs site
	@echo "site/index.html"

pictures: $(VENV)/.pictures ## the pictures of MLflow's pages in docs/images, from the demo (needs Chromium)
	$(BIN)/python scripts/pictures.py $(ARGS)

matrix: ## the fast tests on an old DSPy and Python, and on the newest
	@scripts/matrix

lowest: ## the fast tests with every package as old as pyproject.toml allows
	@MATRIX=lowest scripts/matrix

nightly: ## all DSPy versions, pre-releases, lower bounds, the wheel, a real server, Ray; and what changed since the last time
	@scripts/nightly

dist: ## the wheel and the sdist: same bytes each time, install alone, licences known
	@scripts/package

bench: $(VENV)/.bench ## what instrumentation costs
	$(BIN)/python benchmarks/overhead.py $(ARGS)

imports: $(VENV)/.bench ## what importing and switching on cost
	$(BIN)/python benchmarks/imports.py $(ARGS)

services: ## get what the integration tests send to, as far as this machine can have it (minutes, once)
	@scripts/backends

backends: ## the Collector and every backend that is on this machine, until Ctrl-C
	@collector/run.sh

collector jaeger phoenix rotel kafka: ## get it, once on this machine (the first two are built with Go)
	@collector/install.sh $@

clean: ## remove what was installed and made here
	rm -rf $(VENV) .venv-* demo-mlflow mlruns dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each stamp says what is installed; a change of pyproject.toml or of the version installs anew.
$(BIN)/python:
	@echo "setting up $(VENV)"
	@$(NEW_VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	@echo "installing the demo's packages (MLflow is large: some minutes the first time)"
	@$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@$(INSTALL) --group test
	@touch $@

$(VENV)/.neighbours: $(VENV)/.test
# All in one: each release of OpenTelemetry's instrumentations wants the SDK of its own release.
	@$(INSTALL) -e ".[demo]" --group test --group neighbours --group workers --group browser
	@touch $@

# There are no wheels for some platforms: the tests say then that they are skipped.
$(VENV)/.server: $(VENV)/.test
	@if $(INSTALL) --group server; then touch $@; fi

$(VENV)/.lint: $(VENV)/.demo
	@$(INSTALL) --group lint --group test
	@touch $@

$(VENV)/.docs: $(BIN)/python pyproject.toml
	@$(INSTALL) --group docs
	@touch $@

$(VENV)/.pictures: $(VENV)/.demo
	@$(INSTALL) --group browser
	@touch $@

$(VENV)/.hooks: $(VENV)/.lint
	@$(INSTALL) --group hooks
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	@$(INSTALL) --group bench
	@touch $@
