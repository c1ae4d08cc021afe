# make demo    set up, export the demo model, draw a scene, describe it
# make test    set up, then everything that must pass: lint, format, types, all tests
# make check   the same without the slow tests, for while you work
# make test-lower-bounds  what a device runs, with the oldest versions that it may have
# make reliability        the attacks and faults of tests/reliability; writes docs/reliability.md
# make engines compile every cut of every pair with TensorRT for RTX; `make test` does some
# make wheel   build the package into dist/, to install it elsewhere
# make clean   remove all that make made

SHELL := /bin/bash
PYTHON ?= $(shell for python in python3.11 python3; do $$python --version >/dev/null 2>&1 && echo $$python && break; done)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := build/demo
# A process for each core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 4

.PHONY: demo test check test-lower-bounds reliability engines wheel clean lint
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/himix-edge export --output $(DEMO)/bundle
	$(BIN)/himix-edge scene -o $(DEMO)/scene.png --seed 2
	$(BIN)/himix-edge run --bundle $(DEMO)/bundle $(DEMO)/scene.png "describe"
	@echo "The picture is $(DEMO)/scene.png"

test: lint
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow"

test-lower-bounds: $(READY)
	OMP_NUM_THREADS=1 HIMIX_EDGE_LOWER_BOUNDS=1 $(BIN)/pytest -q tests/test_lower_bounds.py

reliability: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/reliability --reliability-table docs/reliability.md

engines: $(READY)
	HIMIX_EDGE_ALL_CUTS=1 $(PYTEST) tests/engines/test_rtx_cuts.py

# In an environment of its own: building needs pip, and none of what make test does.
wheel:
	@$(PYTHON) -m venv build/packaging
	@build/packaging/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Made once, and again when the requirements change.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with $(PYTHON): torch is large, this takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[rtx]' \
	  || echo "No TensorRT for RTX: the tests that compile with it will be skipped."
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
