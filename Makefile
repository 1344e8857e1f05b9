# make demo   the main job, end to end          make bench   every benchmark
# make test   all tests, with coverage          make lint    formatting, types, style
# make fuzz   damaged checkpoints, loaded for FUZZ_SECONDS=60
# Each sets up what it needs (make setup): .venv, torch, the other dependencies, the extension.
#
# TORCH=2.13.0   another version of torch       PYTHON=python3   the Python that .venv is made from
# TORCH_INDEX=https://download.pytorch.org/whl/cpu   where torch comes from, in place of pip's own index
# V=1            what the compiler says; otherwise it goes to build/log, and is shown where the build fails

TORCH  ?= 2.13.0
PYTHON ?= python3

VENV      := .venv
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed-torch-$(TORCH)
EXTENSION := fastopt/.extension-built
CSRC      := $(shell find csrc tests/core tests/cuda tests/gpu -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
JOBS      := $(shell nproc)
COMPILE   := MAX_JOBS=$(JOBS) $(BIN)/python setup.py --quiet build_ext --inplace

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test fuzz bench lint format cuda-build gpu-check clean

setup: $(EXTENSION)

# torch first and pinned: a bare `torch`, or a range that a dependency brings, may pull several GB of CUDA packages.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet "setuptools>=77" ninja
	FASTOPT_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,lint,bench]"
	rm -f $(VENV)/.installed-torch-*
	touch $@

$(EXTENSION): $(INSTALLED) $(CSRC) setup.py
ifdef V
	$(COMPILE)
else
	@echo "building the extension: minutes at first; V=1 shows how"
	@mkdir -p build && ($(COMPILE) >build/log 2>&1 || (cat build/log; exit 1))
endif
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --cov --cov-report=term

FUZZ_SECONDS ?= 60

fuzz: setup
	$(BIN)/python -m tests.fuzz.readers --seconds $(FUZZ_SECONDS)

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

# ---- CUDA ----
# make cuda-build   the extension against a torch with CUDA (several GB, in build/cuda-venv), compiled by the nvcc that is
#                   there (CUDA_HOME, where it is not found), linked, imported, and tested; needs no GPU: a stand-in for
#                   CUDA's runtime copies memory of the host, and plays fastopt's own kernels
# make gpu-check    on a machine with a GPU: the extension against the torch of GPU_PYTHON, and the tests that need a GPU

CUDA_TORCH ?= 2.11.0
CUDA_ARCHS ?= 8.0;9.0;10.0
GPU_PYTHON ?= python3
CUDA_VENV  := build/cuda-venv
STAND_IN   := build/cuda/stand-in/libcuda.so.1

$(CUDA_VENV)/.installed-torch-$(CUDA_TORCH):
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet "torch==$(CUDA_TORCH)"
	$(CUDA_VENV)/bin/python -m pip install --quiet "setuptools>=77,<82" ninja pytest hypothesis numpy
	touch $@

# torch looks for the driver by that name, and takes what has been loaded under it.
$(STAND_IN): tests/gpu/stand_in/runtime.cpp $(CSRC)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O2 -Wall -Wextra -shared -fPIC -Wl,-soname,$(@F) \
		-isystem $(or $(CUDA_HOME),/usr/local/cuda)/include $< -o $@ -ldl

cuda-build: $(CUDA_VENV)/.installed-torch-$(CUDA_TORCH) $(STAND_IN)
	FASTOPT_BUILD=cuda TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" MAX_JOBS=$(JOBS) \
		$(CUDA_VENV)/bin/python setup.py --quiet build --build-base build/cuda --build-lib build/cuda/lib
	rm -rf build/cuda/lib/tests && cp -r tests build/cuda/lib
	cd build/cuda/lib && $(abspath $(CUDA_VENV))/bin/python -m fastopt info
	cd build/cuda/lib && LD_PRELOAD=$(abspath $(STAND_IN)) \
		$(abspath $(CUDA_VENV))/bin/python -m pytest -p no:cacheprovider tests/gpu

gpu-check:
	FASTOPT_BUILD=cuda $(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m pytest -p no:cacheprovider tests/gpu

clean:
	rm -rf build dist *.egg-info fastopt/*.so $(EXTENSION) $(VENV)
