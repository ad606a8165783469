# Every target works in a fresh clone: it makes a virtual environment in .venv, installs torch and
# what else is needed, and compiles the package.

PYTHON ?= python3
VENV ?= .venv
# The torch to build and test against. Another one, or another index: make test TORCH="torch==2.11.0"
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
INSTALLED := $(VENV)/.installed
CXX_FILES := $(shell find csrc tests/cpp benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.inl')

.DEFAULT_GOAL := help
.PHONY: help install test python-test cpp-test lint format demo bench clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(INSTALLED)  ## Install the package, compiled, with everything for development into .venv

# torch comes first: the package is compiled against it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" ninja $(TORCH)
	@touch $@

$(INSTALLED): $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,demo,lint]"
	@touch $@

test: cpp-test python-test  ## Run all tests: C++ under sanitizers, then Python with all doctests

python-test: $(INSTALLED)
	$(BIN)/python -m pytest --doctest-modules emerging_optimizers tests $(PYTEST_ARGS)

cpp-test: $(INSTALLED)
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

lint: $(INSTALLED)  ## Check formatting, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(INSTALLED)  ## Format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

demo: $(INSTALLED)  ## Train a small language model with each rule; table and curves in build/demo
	$(BIN)/python examples/train_char_lm.py --rule all --output build/demo

bench: $(INSTALLED)  ## Measure the update functions; figures in build/bench_functions.json
	$(BIN)/python benchmarks/bench_functions.py --json build/bench_functions.json

clean:  ## Remove what was built, the virtual environment included
	rm -rf $(VENV) build dist *.egg-info emerging_optimizers/*.so
