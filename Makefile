# make demo | test | bench | wheel | docs | lint | gpu | clean. Everything happens in .venv, built on first use.
PYTHON ?= python3
# The build needs this torch (or the one named here); another changes nothing but the environment.
TORCH ?= torch==2.13.0
# Versions that `make try-wheel` installs the wheel beside.
TORCHES ?= 2.10.0 2.14.1
DIST ?= dist
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc kernels fastseq -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench wheel try-wheel docs lint format gpu build clean

demo: build
	$(BIN)/fastseq demo

test: build
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# Without a package index one baseline is missing, and the table says so.
bench: build
	-$(BIN)/python -m pip install -q --disable-pip-version-check -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.bench_recurrent

# One file for every Python and every torch from 2.10 on. The folders are setuptools' own: what an
# earlier build left in them would go into the wheel.
wheel: build
	rm -rf build/lib* build/bdist*
	FASTSEQ_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel -q --disable-pip-version-check \
	  --no-deps --no-build-isolation -w $(DIST) .
	@ls $(DIST)/*.whl

# Fetches gigabytes: each torch comes with the libraries it wants.
try-wheel: wheel
	$(BIN)/python -m tests.try_wheel $(DIST)/*.whl --torch $(TORCHES)

# The guide and the reference, as pages in build/docs.
docs: build
	$(BIN)/python -m pip install -q --disable-pip-version-check -r docs/requirements.txt
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs build/docs
	@echo build/docs/index.html

# Needs a machine with a GPU and a CUDA build of torch for its python3; no network.
gpu:
	bash benchmarks/gpu.sh

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

build: $(VENV)/built

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(SOURCES)
	FASTSEQ_REQUIRE_NATIVE=1 $(BIN)/python -m pip install -v --disable-pip-version-check \
	  --no-deps --no-build-isolation -e . > $(VENV)/build.log 2>&1 || (tail -40 $(VENV)/build.log; exit 1)
	@grep -oE 'fastseq: (built|left out) .*' $(VENV)/build.log
	touch $@

clean:
	rm -rf build dist $(VENV) fastseq/*.so *.egg-info
