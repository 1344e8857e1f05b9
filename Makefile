# make demo   the main job, end to end          make bench   every benchmark
# make test   all tests, with coverage          make lint    formatting, types, style
# make docs   the site, in build/site
# make fuzz   damaged checkpoints, loaded for FUZZ_SECONDS=60; then core under libFuzzer, where there is clang
# make soak   loads and saves for SOAK_SECONDS=1800, memory, files and threads watched; its plot in build/soak
# make packages   sdist and wheels, built and installed into an environment of their own, with and without a compiler
# make test-integrations   trainings of Lightning, Accelerate, transformers and others' optimizers, under fastopt, and
#                          the examples that resume
# make sanitize   C++ under the address and undefined-behaviour sanitizers: core's tests, and the extension's
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

.PHONY: setup demo test test-integrations fuzz soak packages sanitize docs bench lint format cuda-build gpu-check clean

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

# libFuzzer comes with clang, 15 or newer (Debian: clang-19 and libclang-rt-19-dev); without it core is left out, and said.
CLANG := $(firstword $(shell command -v clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++))

fuzz: setup
	$(BIN)/python -m tests.fuzz.readers --seconds $(FUZZ_SECONDS)
ifeq ($(CLANG),)
	@echo "core is not fuzzed: there is no clang++"
else
	@mkdir -p build/fuzz/corpus
	$(CLANG) -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -pthread -Icsrc/core \
		csrc/core/*.cpp tests/fuzz/core.cpp -o build/fuzz/core
	build/fuzz/core -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1 -artifact_prefix=build/fuzz/ \
		build/fuzz/corpus
endif

SOAK_SECONDS ?= 1800

soak: setup
	$(BIN)/python -m tests.soak --seconds $(SOAK_SECONDS) --output build/soak

packages: setup
	FASTOPT_TORCH="$(TORCH)" FASTOPT_TORCH_INDEX="$(TORCH_INDEX)" \
		$(BIN)/python -m pytest -p no:cacheprovider tests/packages.py

# The extension of its own, in build/sanitized, with the assertions of Python's headers (CFLAGS lacks their NDEBUG).
# Python and torch themselves are not built so: what they leave at exit is no leak of ours, and the tests count references
# and memory by themselves. What starts other Pythons, or needs torch's own OpenMP to end its threads, is left out. Memory
# without end that a damaged file has Python ask for is an error of malloc's, as ever.
SANITIZED := build/sanitized
SANITIZED_TESTS ?= tests/test_batch_copy.py tests/test_load_values.py tests/test_load_modes.py tests/test_inplace.py \
	tests/test_donation.py tests/test_audit.py tests/test_torch_write.py tests/test_plain_pickle.py \
	tests/test_damaged_files.py tests/test_safetensors.py tests/test_file_jobs.py tests/test_dcp_folder.py

sanitize: setup
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_core.py tests/test_cuda.py
	CFLAGS="-fsanitize=address,undefined -fno-omit-frame-pointer" LDFLAGS="-fsanitize=address,undefined" \
		FASTOPT_BUILD=cpu MAX_JOBS=$(JOBS) $(BIN)/python setup.py --quiet build \
		--build-base $(SANITIZED)/base --build-lib $(SANITIZED)/lib
	rm -rf $(SANITIZED)/lib/tests && cp -r tests README.md $(SANITIZED)/lib
	cd $(SANITIZED)/lib && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(abspath $(BIN))/python -m pytest -p no:cacheprovider -q $(SANITIZED_TESTS)

# Trainers and optimizers from PyPI, in an environment of their own, beside the torch of this one.
INTEGRATIONS := build/integrations-venv
TRAINERS     := lightning accelerate transformers schedulefree prodigyopt lion-pytorch pytorch_optimizer torchao

test-integrations: setup
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet "torch==$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(INTEGRATIONS)/bin/python -m pip freeze | grep "^torch==" > build/torch-is-there.txt
	$(INTEGRATIONS)/bin/python -m pip install --quiet --constraint build/torch-is-there.txt \
		safetensors pytest hypothesis numpy $(TRAINERS)
	$(INTEGRATIONS)/bin/python -m pytest -p no:cacheprovider -rs tests/integrations

# In an environment of its own, without torch: the API's page is read from the sources, which nothing runs.
DOCS       := build/docs-venv
DOCS_NEEDS := $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',')

docs:
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet $(DOCS_NEEDS)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	$(DOCS)/bin/python -m tests.site build/site

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
