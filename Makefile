PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= build/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help demo test lint types pytest format clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## set up, then quantize the embedded model with and without Quadapter
	$(BIN)/python -m aimet_quadapter run --output $(OUTPUT)

test: lint types pytest  ## set up, then lint, type check and test

lint: $(INSTALLED_DEV)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED_DEV)  ## mypy
	$(BIN)/mypy

pytest: $(INSTALLED_DEV)  ## the tests alone
	$(BIN)/python -m pytest

format: $(INSTALLED_DEV)  ## let ruff write
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what make made, the environment included
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One environment serves both: `test` adds the developer's tools to what `demo` installs.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): setup.py | $(BIN)/python
	$(PIP) install --quiet --editable .
	touch $@

$(INSTALLED_DEV): setup.py | $(BIN)/python
	$(PIP) install --quiet --editable '.[dev]'
	touch $@ $(INSTALLED)
