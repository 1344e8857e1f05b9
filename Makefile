# make demo   the main job, end to end          make bench   every benchmark
# make test   all tests, with coverage          make lint    formatting, types, style
# Each sets up what it needs (make setup): .venv, torch, the other dependencies, the extension.
#
# TORCH=2.13.0   another version of torch       PYTHON=python3   the Python that .venv is made from

TORCH  ?= 2.13.0
PYTHON ?= python3

VENV      := .venv
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed-torch-$(TORCH)
EXTENSION := fastopt/.extension-built
CSRC      := $(shell find csrc tests/core -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
JOBS      := $(shell nproc)

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test bench lint format clean

setup: $(EXTENSION)

# torch first and pinned: a bare `torch`, or a range that a dependency brings, pulls several GB of CUDA packages.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" ninja
	FASTOPT_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,lint,bench]"
	rm -f $(VENV)/.installed-torch-*
	touch $@

$(EXTENSION): $(INSTALLED) $(CSRC) setup.py
	MAX_JOBS=$(JOBS) $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --cov --cov-report=term

bench: setup
	$(BIN)/python -m benchmarks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf build dist *.egg-info fastopt/*.so $(EXTENSION) $(VENV)
