# Every target creates .venv and installs what it lacks, once: a stamp file remembers each step until pyproject.toml or
# constraints.txt changes. Nothing is fetched on a second run.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
SETUP  := pyproject.toml constraints.txt

# hatchling builds the editable install inside .venv, so that a changed pyproject.toml needs no network either.
INSTALL := $(PIP) install --quiet --no-build-isolation --constraint constraints.txt

# Two test processes with one thread each are faster on two cores than one process with two threads.
WORKERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help demo papers test test-web test-all test-oldest lint format bench lab docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(VENV)/.runtime  ## the bundled model reads 16 times its training length; report in build/demo
	$(BIN)/danlu extend --out build/demo

test: $(VENV)/.dev  ## the tests that prove it, in a few minutes
	$(PYTEST) -m "not slow and not browser"

# Chromium and PostgreSQL come from the system's packages: tests of the site drive the one and store in the other.
test-web: $(VENV)/.dev  ## the site in a real browser, and on a real PostgreSQL
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || apt-get install -y -qq postgresql
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/papers

papers: $(VENV)/.papers  ## serve the papers site from its sample data
	$(BIN)/danlu papers serve

test-all: $(VENV)/.dev  ## every test
	$(PYTEST)

# The oldest transformers that pyproject.toml allows, in an environment of its own.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
test-oldest:  ## the same tests on the oldest supported transformers
	$(MAKE) VENV=.venv-oldest .venv-oldest/.dev
	.venv-oldest/bin/python -m pip install --quiet "transformers==$(OLDEST)"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) -m "not slow and not browser"

lint: $(VENV)/.dev  ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.peers  ## cost claims: ours, the peer's, the ratio
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

lab: $(VENV)/.peers  ## re-run every method's claim; gallery in build/lab
	$(BIN)/danlu lab run --out build/lab

docs: $(VENV)/.docs  ## the site, in build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

clean:  ## remove what was built (not .venv)
	rm -rf build/demo build/docs build/lab dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: everything else then resolves against the build that is already there.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install --quiet $(shell grep '^torch==' constraints.txt)
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch $(SETUP)
	$(PIP) install --quiet --constraint constraints.txt hatchling editables
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(INSTALL) --editable '.[dev]'
	@touch $@

# Peers of the claims and benchmarks; one of them comes as source, which setuptools builds.
$(VENV)/.peers: $(VENV)/.runtime
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel
	$(INSTALL) --editable '.[lab,bench]'
	@touch $@

$(VENV)/.papers: $(VENV)/.runtime
	$(INSTALL) --editable '.[papers]'
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	$(INSTALL) --editable '.[docs]'
	@touch $@
