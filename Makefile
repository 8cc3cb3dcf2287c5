PYTHON ?= python3
VENV ?= .venv
LATEST ?= .venv-latest
OUTPUT ?= build/demo

LOCK := requirements.lock
HELD := torch==2.14.1 torchvision==0.29.1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help demo test bench lint types pytest test-latest format lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## set up, then quantize the embedded model with and without Quadapter
	$(BIN)/python -m aimet_quadapter run --output $(OUTPUT)

test: lint types pytest  ## set up, then lint, type check and test

bench: $(INSTALLED)  ## set up, then the short set of benchmarks beside the committed figures
	$(BIN)/python benchmarks/short.py

lint: $(INSTALLED_DEV)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED_DEV)  ## mypy
	$(BIN)/mypy

pytest: $(INSTALLED_DEV)  ## the tests alone
	$(BIN)/python -m pytest

test-latest: | $(LATEST)/bin/python  ## the tests alone, with the newest of everything, in an environment of its own
	$(LATEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[demo,dev]'
	$(LATEST)/bin/python -m pytest

format: $(INSTALLED_DEV)  ## let ruff write
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without hashes: where a constraint has one, pip refuses what has none, the editable package first.
lock: | $(BIN)/python  ## pin the newest of everything anew, torch excepted
	$(PIP) install --quiet --upgrade uv
	printf '%s\n' $(HELD) | $(BIN)/uv pip compile --quiet --upgrade --constraint - \
		--universal --python-version 3.10 --python $(BIN)/python --no-python-downloads \
		--all-extras --no-emit-index-url --annotation-style line \
		--custom-compile-command 'make lock' --output-file $(LOCK) setup.py

clean:  ## remove what make made, environments included
	rm -rf $(VENV) $(LATEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One environment serves both: `test` adds the developer's tools to what `demo` installs. All versions
# are the lock's, and so is that of setuptools: a build of its own environment would take the newest.
define install
	$(PIP) install --quiet --constraint $(LOCK) setuptools
	$(PIP) install --quiet --constraint $(LOCK) --no-build-isolation --editable '$(1)'
	touch $@
endef

$(INSTALLED): setup.py $(LOCK) | $(BIN)/python
	$(call install,.)

$(INSTALLED_DEV): setup.py $(LOCK) | $(BIN)/python
	$(call install,.[dev])
	touch $(INSTALLED)

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $*
