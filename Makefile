# The whole developer manual. Every target works from a fresh clone; a second run does only what is new.

PYTHON ?= python3
PROMPT ?= Once upon a time
BENCH ?=
MINUTES ?= 10

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
SANITIZE := build/sanitize
PEERS := build/bench/venv
EMULATE := build/emulate

# The package is installed in place: a changed .py file is live at once, these need a new build.
NATIVE := pyproject.toml constraints.txt CMakeLists.txt $(shell find core -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name CMakeLists.txt)
CORE_SOURCES = $(shell find core -name '*.h' -o -name '*.cpp' -o -name '*.inl')

# What Python cannot reach, tested in C++: $(call core_tests, folder of cmake, build folder, options).
core_build = $(1)/cmake -S . -B $(2) -DONEBIT_BUILD_PYTHON=OFF -DONEBIT_BUILD_TESTS=ON $(3) >/dev/null \
	&& $(1)/cmake --build $(2) >/dev/null
core_tests = $(core_build) && $(1)/ctest --test-dir $(2) --output-on-failure --no-tests=error

# The same on another CPU: $(call emulated_tests, build folder, emulator, CPU, the kernels that it must have).
emulated_tests = $(2) -cpu $(3) $(1)/core/core_tests --expect $(4)
QEMU_AARCH64 := qemu-aarch64 -L /usr/aarch64-linux-gnu
CROSS_AARCH64 := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
# Without what the emulator lacks, and would complain about in each thread.
HASWELL := Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid
# llama.cpp as a judge of GGUF files: the same on every machine, and without what it is not asked for.
JUDGE := -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_CURL=OFF -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF
HAVE_EMULATORS := command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null && command -v qemu-x86_64 >/dev/null
EMULATOR_PACKAGES := apt install g++-aarch64-linux-gnu qemu-user

.DEFAULT_GOAL := help
.PHONY: help run test emulate lint format sanitize fuzz ray bench report clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: $(VENV)/.run ## build once, then let the shipped model tell a story (PROMPT="...")
	@$(BIN)/onebit run "$(PROMPT)"

test: $(VENV)/.dev ## run the whole test suite
	@$(call core_tests,$(BIN),build/core,)
	@if $(HAVE_EMULATORS); then $(MAKE) --no-print-directory emulate; \
	else echo "onebit: left out: the kernel tests on instruction sets that this machine lacks ($(EMULATOR_PACKAGES))" >&2; fi
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	echo "onebit: left out: the tests of the server's page in a browser (apt install chromium chromium-driver)" >&2
	@$(BIN)/python -m pytest

emulate: $(VENV)/.dev ## run the kernel tests on instruction sets that this machine lacks
	@{ $(HAVE_EMULATORS); } || { echo "onebit: no cross compiler or no emulator; $(EMULATOR_PACKAGES)" >&2; exit 1; }
	@$(call core_build,$(BIN),$(EMULATE)/aarch64,$(CROSS_AARCH64))
	@$(call emulated_tests,$(EMULATE)/aarch64,$(QEMU_AARCH64),max,neon_i8mm neon_dotprod scalar)
	@$(call emulated_tests,$(EMULATE)/aarch64,$(QEMU_AARCH64),cortex-a76,neon_dotprod scalar)
	@$(call emulated_tests,$(EMULATE)/aarch64,$(QEMU_AARCH64),cortex-a72,scalar)
	@if [ "$$(uname -m)" = x86_64 ]; then $(call core_build,$(BIN),build/core,) \
	&& $(call emulated_tests,build/core,qemu-x86_64,$(HASWELL),avx2 scalar); fi

lint: $(VENV)/.dev ## check style, types and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CORE_SOURCES)

format: $(VENV)/.dev ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CORE_SOURCES)

# A Python without instrumentation loads an instrumented core, so the runtimes must come first; libstdc++ with
# them, or the interceptor of exceptions finds nothing to forward to. Python keeps memory at exit: no leak check.
# A cache of terabytes must end in MemoryError here too, so the allocator may refuse.
sanitize: $(SANITIZE)/.built ## run the tests of the core under AddressSanitizer and UBSan
	@$(call core_tests,$(SANITIZE)/venv/bin,$(SANITIZE)/core,-DONEBIT_SANITIZE=ON)
	@LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc \
	$(SANITIZE)/venv/bin/python -m pytest -p no:cacheprovider tests/core tests/attacks tests/engine

fuzz: $(VENV)/.fuzz ## throw damaged files at the readers for MINUTES (10)
	@$(BIN)/python tests/fuzz/readers.py --minutes $(MINUTES)

# A busy machine never gets round to Ray's workers at the low priority that they have otherwise.
ray: $(VENV)/.ray ## two replicas of the server under Ray Serve, one of which is killed under load
	@RAY_worker_niceness=0 RAY_AUTH_MODE=disabled $(BIN)/python tests/serve/replicas.py

bench: $(PEERS)/.built ## measure speed beside the machine's limits and other engines (BENCH="--quick")
	@$(PEERS)/bin/python benchmarks/speed.py $(BENCH)

report: $(VENV)/.report ## rebuild the page of docs/results from its files
	@$(BIN)/onebit report docs/results -o docs/results/report.html --mix

clean: ## remove everything that was built
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "onebit: $(PYTHON) not found; onebit needs Python 3.11 or newer (apt install python3-dev python3-venv, or make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "onebit: $$($(PYTHON) -V) is too old; onebit needs Python 3.11 or newer (make PYTHON=python3.12)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "onebit: $(PYTHON) cannot make virtual environments; apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.toolchain: | $(VENV)/bin/python
	@echo 'int main() { return 0; }' | $${CXX:-c++} -std=c++20 -x c++ -fsyntax-only - 2>/dev/null || { echo "onebit: no C++20 compiler ($${CXX:-c++}); apt install g++, or set CXX" >&2; exit 1; }
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "onebit: Python.h not found; apt install python3-dev" >&2; exit 1; }
	@touch $@

$(VENV)/.run: $(NATIVE) | $(VENV)/.toolchain
	@echo "onebit: building (about a minute, once)" >&2
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(NATIVE) | $(VENV)/.toolchain
	@echo "onebit: installing the test environment (PyTorch is in it, and llama.cpp is compiled: minutes, once)" >&2
	@CMAKE_ARGS="$(JUDGE)" $(PIP) llama-cpp-python
	@$(PIP) --editable ".[train,dev]"
	@touch $(VENV)/.run $@

$(VENV)/.report: $(VENV)/.run
	@$(PIP) matplotlib
	@touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	@$(PIP) atheris
	@touch $@

$(VENV)/.ray: $(VENV)/.dev
	@$(PIP) "ray[serve]"
	@touch $@

$(SANITIZE)/.built: $(NATIVE) $(shell find src -name '*.py') | $(VENV)/.toolchain
	@echo "onebit: building with sanitizers" >&2
	@test -x $(SANITIZE)/venv/bin/python || $(PYTHON) -m venv $(SANITIZE)/venv
	@$(SANITIZE)/venv/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt \
	  --config-settings=build-dir=$(SANITIZE)/cmake --config-settings=cmake.define.ONEBIT_SANITIZE=ON \
	  . pytest hypothesis safetensors cmake
	@touch $@

# llama.cpp is compiled here, for this machine: a wheel that pip keeps may come from another one, or other flags.
# The header keeps GCC 12 from breaking its AMX kernels.
$(PEERS)/.built: $(NATIVE) benchmarks/requirements.txt benchmarks/engines/llama_amx.h | $(VENV)/.toolchain
	@echo "onebit: installing PyTorch and other engines; llama.cpp is compiled (about ten minutes, once)" >&2
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable ".[train]"
	@CXXFLAGS='$(CXXFLAGS) -include "$(CURDIR)/benchmarks/engines/llama_amx.h"' $(PEERS)/bin/python -m pip install -qq --disable-pip-version-check --no-cache-dir \
	  --constraint constraints.txt --requirement benchmarks/requirements.txt
	@touch $@
