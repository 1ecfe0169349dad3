#!/usr/bin/env bash
# Everything that needs a GPU, with what the machine has and nothing fetched: builds clora._C in the tree, then runs
# the parts named, or all: `tests` (those marked gpu), `sanitizer` (the kernels' tests under compute-sanitizer), and
# benches by name, with --json into bench/results/. Where a call is limited to ten minutes:
#     bench/gpu.sh tests kernels.{lora_linear,lora_qkv,adaln,renoise,dmd_score} serving.sampler training.tiny_step
#     bench/gpu.sh kernels.block kernels.forward sanitizer
#     bench/gpu.sh training.train_cycle
#     bench/gpu.sh train_cycle_lean      # with an int8 base and bfloat16 moments
#     bench/gpu.sh train_cycle_60        # 60 layers, ours alone, within 125 GB
# PYTHON chooses the interpreter (default python3); it needs torch, pytest, pybind11, cmake and a C++ compiler, and
# diffusers and peft for block, forward and train_cycle.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

"$python" - <<'PY'
import torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, GPU: {gpu}")
PY

generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
cmake -S . -B build/gpu "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >/dev/null
cmake --build build/gpu
cmake --install build/gpu --prefix .

failed=()

gpu_tests() {
  # Only files that hold such tests are collected: the others may import packages that this machine lacks.
  local files
  mapfile -t files < <(grep -rlE 'mark\.gpu|pytestmark.*gpu' tests --include='test_*.py' | sort)
  echo "== pytest -m gpu ${files[*]}"
  # A file that cannot be collected here is reported and fails the run, after all others have run.
  "$python" -m pytest -m gpu -rs --continue-on-collection-errors "${files[@]}" || failed+=("pytest -m gpu")
}

sanitizer() {
  local tool
  if ! command -v compute-sanitizer >/dev/null; then
    echo "== compute-sanitizer is not installed: memory and races are not checked"
    return
  fi
  # Without torch's cache of memory each tensor is an allocation, whose ends are then known.
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer --tool $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
      "$python" -m pytest -q -o timeout=0 -m gpu -k "many_tiles or repeats_bit_for_bit or layouts_and_dtypes" tests/kernels ||
      failed+=("compute-sanitizer --tool $tool")
  done
}

mkdir -p bench/results
parts=("$@")
if ((${#parts[@]} == 0)); then
  mapfile -t benches < <("$python" -m bench)
  parts=(tests sanitizer "${benches[@]}" train_cycle_lean train_cycle_60)
fi
for name in "${parts[@]}"; do
  command=("bench.$name" --json)
  case "$name" in
    tests) gpu_tests && continue ;;
    sanitizer) sanitizer && continue ;;
    train_cycle_lean) command=(bench.training.train_cycle --json --runs lean authors) ;;
    train_cycle_60) command=(bench.training.train_cycle --json --size full-width-60 --runs exact) ;;
  esac
  result="bench/results/${name##*.}.json"
  echo "== python -m ${command[*]} > $result"
  if "$python" -m "${command[@]}" >"$result.tmp"; then
    mv "$result.tmp" "$result"
    cat "$result"
  else
    rm -f "$result.tmp"
    failed+=("bench.$name")
  fi
done

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[*]}" >&2
  exit 1
fi
