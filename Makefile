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

# What is written in C++, so that all of it that runs is instrumented: addresses and undefined behaviour, then races of
# eight threads. The queue and the reader of safetensors have no tensors; the batcher and clora-sample are linked to
# torch, which is not instrumented itself.
SANITIZED := $(CXX) -std=c++20 -O1 -g -Wall -Wextra -fno-omit-frame-pointer -fno-sanitize-recover=all -pthread
QUEUE := csrc/tests/queue_stress.cpp csrc/step_queue.cpp
READER := csrc/tests/safetensors_fuzz.cpp csrc/safetensors.cpp csrc/json.cpp
ENGINE := csrc/batcher.cpp csrc/sample.cpp csrc/step_queue.cpp csrc/steps.cpp
SAMPLE := csrc/clora_sample.cpp csrc/aoti.cpp csrc/json.cpp csrc/safetensors.cpp csrc/sha256.cpp
TORCH = $(shell $(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
WITH_TORCH = -ffp-contract=off -isystem $(TORCH)/include -isystem $(TORCH)/include/torch/csrc/api/include \
  -L$(TORCH)/lib -Wl,-rpath,$(TORCH)/lib -Wl,--allow-shlib-undefined -ltorch -ltorch_cpu -lc10
BUILT := build/sanitize
sanitize: setup
	mkdir -p $(BUILT)
	$(SANITIZED) -fsanitize=address,undefined -o $(BUILT)/queue_address $(QUEUE)
	$(SANITIZED) -fsanitize=thread -o $(BUILT)/queue_thread $(QUEUE)
	$(SANITIZED) -fsanitize=address,undefined -o $(BUILT)/reader_address $(READER)
	$(BUILT)/reader_address $(BUILT) 20000
	$(BUILT)/queue_address 10000 8
	$(BUILT)/queue_thread 10000 8
	$(SANITIZED) -fsanitize=address,undefined -o $(BUILT)/batcher_address csrc/tests/batcher_stress.cpp $(ENGINE) $(WITH_TORCH)
	$(BUILT)/batcher_address 10000 8
	$(SANITIZED) -fsanitize=thread -o $(BUILT)/batcher_thread csrc/tests/batcher_stress.cpp $(ENGINE) $(WITH_TORCH)
	$(BUILT)/batcher_thread 10000 8
	$(SANITIZED) -fsanitize=address,undefined -o $(BUILT)/clora-sample $(SAMPLE) $(ENGINE) $(WITH_TORCH)
	CLORA_SAMPLE=$(BUILT)/clora-sample $(BIN)/python -m pytest -q tests/export -k clora_sample

clean:
	rm -rf .venv build dist runs
