# Every target works in a fresh clone: it creates a virtual environment in .venv, installs torch and
# the other requirements, and compiles the package. PYTHON=... uses the environment of that
# interpreter instead, which must have torch.

VENV ?= .venv
# The torch to build and test against, as pip takes it: make test TORCH="torch==2.11.0"
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# Each process imports torch and runs kernels with all threads, so more processes take longer. The
# tests of a file share what they build, so they run in one process.
PYTEST_PROCESSES ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

ifeq ($(origin PYTHON),undefined)
  PY := $(VENV)/bin/python
  BIN := $(VENV)/bin
  # Another TORCH means a new environment.
  TORCH_STAMP := $(VENV)/.torch-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)
else
  PY := $(PYTHON)
  BIN := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
  TORCH_STAMP :=
endif

INSTALLED := build/.installed-$(shell echo '$(PY) $(TORCH_STAMP)' | cksum | cut -d' ' -f1)
SOURCES := setup.py pyproject.toml emerging_optimizers/_build.py $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/cpp benchmarks examples -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help install test python-test test-user-rules emulated-test cpp-test lint cuda-check gpu-check format demo \
    bench chart wheel clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 17

install: $(INSTALLED)  ## Install the package, compiled, with everything for development

$(VENV)/.torch-%:
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet "setuptools>=77" ninja $(TORCH)
	@rm -f $(VENV)/.torch-* && touch $@

# The package is compiled against the installed torch, hence without isolation, and in place, hence
# for one environment at a time: other installations are out of date then.
$(INSTALLED): $(TORCH_STAMP) $(SOURCES)
	$(PY) -m pip install --quiet "setuptools>=77" ninja
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[test,demo,lint,wheel]"
	@mkdir -p $(@D) && rm -f build/.installed-* && touch $@

test: cpp-test python-test test-user-rules emulated-test  ## Run all tests: C++ under sanitizers, Python, doctests

python-test: $(INSTALLED)  ## Run the Python tests and doctests alone
	$(PY) -m pytest $(PYTEST_PROCESSES) --doctest-modules emerging_optimizers tests $(PYTEST_ARGS)

# The tests of a rule's functions and optimizers, with rules that are defined in Python.
USER_RULE_TESTS := autograd bits changes_between_steps checkpoints compile dispatch distributed \
    dtypes_and_layouts errors failed_steps fake_tensors fallback function_arguments functions \
    grad_scaling hyperparameters loading megatron_checkpoints megatron_grads megatron_remainders \
    megatron_states megatron_steps optimizer_errors overlap registry rounding state_dicts \
    split_masters states stochastic_rounding tracing trajectories weight_decay zero_lr

test-user-rules: $(INSTALLED)  ## Run the tests of rules with those of tests/user_rules.py
	$(PY) -m pytest $(PYTEST_PROCESSES) --rules user $(USER_RULE_TESTS:%=tests/test_%.py) $(PYTEST_ARGS)

# The CUDA engine's code, run on the host by emulated CUDA devices. With a CUDA build of PyTorch,
# python-test and gpu-check use real devices instead.
emulated-test: $(INSTALLED)  ## Run the CUDA engine's tests alone, on emulated devices
	$(PY) -c "import torch; exit(torch.version.cuda is not None)" || exit 0; \
	$(PY) -m pytest $(PYTEST_PROCESSES) --device emulated $$(grep -l "pytest.mark.on_devices(" tests/test_*.py)

cpp-test: $(INSTALLED)  ## Run the C++ tests alone, under sanitizers
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cmake -S . -B build/cmake -G Ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure --parallel $$(getconf _NPROCESSORS_ONLN)

lint: $(INSTALLED)  ## Check formatting, style, types and spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/codespell

# Install the requirements of an extra; the package is installed already.
$(INSTALLED)-%: $(INSTALLED)
	$(PY) -m pip install --quiet "emerging-optimizers-native[$*]"
	@touch $@

.PHONY: docs
docs: $(INSTALLED)-docs  ## Build the documentation in build/docs, run its code and check its links
	$(PY) -m sphinx -W --keep-going -q docs build/docs
	$(PY) -m pytest -q tests/test_docs.py

cuda-check: $(INSTALLED)-cuda-check  ## Compile the CUDA kernels and check their code; needs no GPU
	$(PY) tools/cuda_check.py

# The wheel may be built beside NVIDIA's package, and an editable installation overwrites no files.
wheel: export EMERGING_OPTIMIZERS_ALLOW_CLASH = 1
wheel: $(INSTALLED)  ## Build sdist and wheel for this torch into dist/, and check them
	$(PY) tools/wheel_check.py dist

format: $(INSTALLED)  ## Format Python and C++
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

demo: $(INSTALLED)  ## Train a small language model with each rule; table and curves in build/demo
	$(PY) examples/train_char_lm.py --rule all --output build/demo

bench: $(INSTALLED)  ## Measure functions, optimizers and clipping, also distributed; results in build/
	$(PY) benchmarks/bench_functions.py --json build/bench_functions.json
	$(PY) benchmarks/bench_optimizers.py --json build/bench_optimizers.json
	$(PY) benchmarks/bench_distributed.py --json build/bench_distributed.json
	$(PY) benchmarks/bench_rules.py --json build/bench_rules.json
	$(PY) benchmarks/bench_interpreter.py --json build/bench_interpreter.json
	$(PY) benchmarks/bench_clipping.py --json build/bench_clipping.json
	$(PY) benchmarks/bench_coded_states.py --json build/bench_coded_states.json

# For machines without network: uses only the packages that are installed.
# make gpu-check GPU_CHECK_ARGS="--only build,bits"
GPU_CHECK_ARGS ?= --budget inf
gpu-check:  ## Build, test and measure on this machine's GPU, with the installed packages
	$(PY) tools/gpu_check.py $(GPU_CHECK_ARGS)

chart: $(INSTALLED)  ## Draw the charts of README and documentation from the committed results
	$(PY) benchmarks/plot.py benchmarks/results/functions-cpu.json docs/functions-cpu.svg
	$(PY) benchmarks/plot.py benchmarks/results/optimizers-cpu.json docs/optimizers-cpu.svg
	$(PY) benchmarks/plot.py benchmarks/results/optimizers-cpu.json docs/adamw-cpu.svg --summary adam
	$(PY) benchmarks/plot.py benchmarks/results/optimizers-cpu.json docs/small-cpu.svg --small adam
	$(PY) benchmarks/plot.py benchmarks/results/offsets-cpu.json docs/offsets-cpu.svg --offsets
	$(PY) benchmarks/plot.py benchmarks/results/training-cpu.json docs/training-cpu.svg --training

clean:  ## Remove everything that was built, and the virtual environment
	rm -rf $(VENV) build dist *.egg-info emerging_optimizers/*.so
