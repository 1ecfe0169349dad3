# make setup | demo | eval-demo | test | lint | bench | torture | sanitize. Each target sets up what it needs: .venv with the
# pinned packages of requirements/cpu.lock and clora built into it. Needed beforehand: python3 >= 3.11, a C++ compiler, make.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
LOCK := requirements/cpu.lock
EXTRAS := dev,train,export,eval,heif,quantize,serve,sign,tensorrt
BIN := .venv/bin
STAMP := .venv/.installed
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/tests/*.cpp)

# Two threads that spin for work on a busy machine slow small models down a hundredfold.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo eval-demo test lint format bench torture sanitize clean
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

# Real photographs, neural styles as effects, and a judge that looks at the pictures.
eval-demo: setup
	$(BIN)/python examples/real_photos/run.py runs/eval-demo

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

# The queue of the step-level batcher and the reader of safetensors, with an engine written in C++, so that all that
# runs is instrumented: addresses and undefined behaviour, then races of eight threads.
QUEUE := csrc/tests/queue_stress.cpp csrc/step_queue.cpp
READER := csrc/tests/safetensors_fuzz.cpp csrc/safetensors.cpp csrc/json.cpp
SANITIZED := $(CXX) -std=c++20 -O1 -g -Wall -Wextra -fno-omit-frame-pointer -fno-sanitize-recover=all -pthread
sanitize:
	mkdir -p build/sanitize
	$(SANITIZED) -fsanitize=address,undefined -o build/sanitize/queue_address $(QUEUE)
	$(SANITIZED) -fsanitize=thread -o build/sanitize/queue_thread $(QUEUE)
	$(SANITIZED) -fsanitize=address,undefined -o build/sanitize/reader_address $(READER)
	build/sanitize/reader_address build/sanitize 20000
	build/sanitize/queue_address 10000 8
	build/sanitize/queue_thread 10000 8

clean:
	rm -rf .venv build dist runs
