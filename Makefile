# `make` alone explains the targets. Everything runs in .venv, which `make setup` creates.

# Some environments forbid byte code; then every import of Megatron compiles it anew: 11 s, not 4 s.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONUNBUFFERED := 1

# Passed to scripts/setup.sh, which searches for one when it is empty.
export PYTHON

# Files of tests run side by side in so many processes; many of them start two ranks of their own.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
IN_VENV := VIRTUAL_ENV="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup quickstart test long duration lint parity chaos recipes bench evidence clean

help:  ## show this text
	@echo 'megatron_cpo: sequence-level Contrastive Preference Optimization for Megatron-Core.'
	@echo
	@echo 'New here? Run "make quickstart": it installs everything into $(VENV) and trains on the CPU.'
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  PYTHON=/path/to/python  the Python to build $(VENV) with, 3.12 or newer (default: search)'
	@echo '  ARGS="..."              more arguments for pytest (make test) or the benchmarks (make bench)'
	@echo
	@echo 'To start over with another Python: rm -rf $(VENV), then make setup PYTHON=...'

setup: $(STAMP)  ## create .venv and install; does nothing when nothing changed
	@echo 'setup: $(VENV) is up to date'

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh scripts/uv.sh
	@bash scripts/setup.sh
	@touch $@

quickstart: $(STAMP)  ## train a small trained model by CPO on this CPU, compare its stories
	$(IN_VENV) bash examples/quickstart.sh

test: duration lint  ## lint, then the tests; ARGS="-k tree" picks some
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
	@# 5: none of the tests that ARGS picks is a GPU's.
	@! nvidia-smi -L >/dev/null 2>&1 || $(BIN)/python -m pytest -m gpu $(ARGS) || [ $$? -eq 5 ]

long: $(STAMP)  ## tests that make test leaves out: whole recipes, layouts that others contain
	$(BIN)/python -m pytest -m long $(ARGS)

duration:
	@echo 'test: lint takes 1 minute, the tests some 12 on two cores; ARGS="-k tree" picks some'

lint: $(STAMP)  ## ruff check, ruff format --check, mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

parity: $(STAMP)  ## every layout against one process, on CPU ranks; writes docs/parity.md
	$(IN_VENV) python -W ignore -m tests.parity $(ARGS)

chaos: $(STAMP)  ## hostile files and kills at random moments, an hour; ARGS="hostile --seed 3"
	$(IN_VENV) nice -n 5 python -W ignore -m tests.chaos $(ARGS)

recipes: $(STAMP)  ## recipes whole, on tiny models: the paper's; three rounds, killed
	$(IN_VENV) python -W ignore -m tests.paper_recipes $(ARGS)
	$(IN_VENV) python -W ignore -m tests.recipe_rounds

bench: $(STAMP)  ## measure; ARGS="--help" lists what, ARGS="--only step" picks
	$(IN_VENV) python -m benchmarks $(ARGS)

evidence: $(STAMP)  ## run the studies of docs/evidence.md, hours; ARGS="--only quickstart --seeds 1"
	$(IN_VENV) nice -n 5 python -W ignore -m benchmarks.evidence $(ARGS)

clean:  ## remove caches and build leftovers; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .uv-errors
	find . -name .git -prune -o -name '.venv*' -prune -o -name runs -prune -o \
		-type d -name __pycache__ -prune -exec rm -rf {} +
