# make setup | demo | test | lint | bench | torture. Each target sets up what it needs: .venv with the pinned packages of
# requirements/cpu.lock and clora built into it. Needed beforehand: python3 >= 3.11, a C++ compiler, make.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
LOCK := requirements/cpu.lock
EXTRAS := dev,train,export,heif,quantize,sign,tensorrt
BIN := .venv/bin
STAMP := .venv/.installed
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h)

# Two threads that spin for work on a busy machine slow small models down a hundredfold.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test lint format bench torture clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml CMakeLists.txt $(CXX_FILES) csrc/build_backend.py
	@$(PYTHON) -c 'import sys; sys.exit("clora needs python >= 3.11, " + sys.executable + " is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
# torch alone and first: with no torch installed, another package's requirement would choose the newest build.
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' $(LOCK))"
	$(BIN)/python -m pip install --quiet -r $(LOCK)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation -c $(LOCK) -e ".[$(EXTRAS)]"
	touch $@

demo: setup
	env -u OMP_NUM_THREADS -u OMP_WAIT_POLICY $(BIN)/clora demo --out runs/demo

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: setup
	@for name in $$($(BIN)/python -m bench); do \
	  echo "== python -m bench.$$name"; $(BIN)/python -m "bench.$$name" || exit 1; done

# Every kill, damage, fault and signal of tests/support/torture.py; the test suite runs some of each.
torture: setup
	$(BIN)/python -m tests.support.torture --out bench/results/torture.json

clean:
	rm -rf .venv build dist runs
