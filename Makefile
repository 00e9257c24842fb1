# Builds, checks and shows fault_a2a. Needs python3 (3.11 or newer, with venv), g++ and make; the rest goes into $(VENV).
#
#   make drill    eight processes, one of them killed in the middle of an all-to-all
#   make test     the test suite (ARGS="-k tidy" goes to pytest; drill and prove take ARGS too)
#   make test-vllm  the tests on a real vLLM, in an environment of its own (VENV_VLLM)
#   make prove    the long runs behind docs/measured.md
#   make simulate  seeded schedules of whole groups, as many as two minutes allow (ARGS="--minutes 60")
#   make lint     what a change is checked for;  make format  mends what can be mended
#   make native   the native tests without Python
#   make clean    forgets the build;  make distclean  forgets $(VENV) too

PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
CPP_FILES = $(shell find benchmarks csrc kernels tests/native tests/simulator -name '*.[ch]pp' -o -name '*.cu' 2>/dev/null)

.PHONY: drill test test-vllm prove simulate lint lint-python lint-types lint-cpp format native build clean distclean
.DELETE_ON_ERROR:

drill: build
	$(VENV)/bin/fault-a2a drill $(or $(ARGS),--kill 3@50)

test: build
	$(PY) -m pytest $(ARGS)

test-vllm: build
	@VENV=$(VENV) VENV_VLLM=$(VENV_VLLM) tests/vllm/run $(ARGS)

prove: build
	$(PY) -m tests.prove $(ARGS)

simulate: $(STAMPS)/tools
	$(PY) -m tests.simulate $(ARGS)

lint: lint-python lint-types lint-cpp

lint-python: $(STAMPS)/tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lint-types: $(STAMPS)/tools
	$(PY) -m mypy

lint-cpp: $(STAMPS)/tools
	@$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES) && echo "C++ is formatted"

format: $(STAMPS)/tools
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

# Always asked, seldom at work: ninja recompiles only what an edit touched. The first time torch is unpacked, by one
# core, while the other compiles.
build:
	@$(MAKE) --no-print-directory -j2 $(STAMPS)/package
	@$(PY) setup.py --quiet build_ext --inplace

native: $(STAMPS)/tools
	$(VENV)/bin/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja \
	  -DFA2A_BUILD_PYTHON=OFF -DFA2A_BUILD_TESTS=ON $(CMAKE_ARGS)
	$(VENV)/bin/cmake --build build/native
	$(VENV)/bin/ctest --test-dir build/native --output-on-failure

# The package in place: the command `fault-a2a`, and fault_a2a.kernels pointing at kernels/.
$(STAMPS)/package: pyproject.toml setup.py $(STAMPS)/tools $(STAMPS)/core
	@$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/core: $(STAMPS)/build-tools
	@echo "Building the native core: a minute the first time"
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# torch goes in before what depends on it, which must find it there and never choose its version.
# Python compiles what is imported; half a minute of pip's compiling would go into what never is.
$(STAMPS)/tools: requirements-dev.txt $(STAMPS)/build-tools
	@echo "Installing torch and the tools into $(VENV): a few minutes, once"
	@$(PY) -m pip install --quiet --no-compile "$$(grep '^torch==' requirements-dev.txt)"
	@$(PY) -m pip install --quiet --no-compile --requirement requirements-dev.txt
	@touch $@

$(STAMPS)/build-tools: requirements-dev.txt $(STAMPS)/venv
	@$(PY) -m pip install --quiet --no-compile $$(sed -n '/^# build/,/^$$/{/==/p}' requirements-dev.txt)
	@touch $@

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: run make PYTHON=python3.12, or whichever newer one there is"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	  { echo "$(PYTHON) comes without its C headers: install them (Debian: apt-get install python3-dev)"; exit 1; }
	@command -v $(CXX) >/dev/null || \
	  { echo "no C++ compiler: install one (Debian: apt-get install g++), or name yours with CXX="; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make a virtual environment (Debian: apt-get install python3-venv)"; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

clean:
	rm -rf build fault_a2a/include fault_a2a/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find $(wildcard fault_a2a kernels tests benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(STAMPS)/package $(STAMPS)/core

distclean: clean
	rm -rf $(VENV) $(VENV_VLLM)
