# make demo | test | bench | lint | gpu | clean. Everything happens in .venv, built on first use.
PYTHON ?= python3
# The build needs this torch (or the one named here); another changes nothing but the environment.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc kernels fastseq -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: demo test bench lint format gpu build clean

demo: build
	$(BIN)/fastseq demo

test: build
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

bench: build
	$(BIN)/python -m benchmarks.bench_recurrent

# Needs a machine with a GPU and a CUDA build of torch for its python3; no network.
gpu:
	bash benchmarks/gpu.sh

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')

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
	rm -rf build $(VENV) fastseq/libfastseq.so *.egg-info
