#!/usr/bin/env bash
# Everything that needs a GPU, with what the machine has and nothing fetched: builds clora._C in the tree, runs the
# tests marked `gpu`, then every bench with --json into bench/results/. Usage: bench/gpu.sh [BENCH ...]
# PYTHON chooses the interpreter (default python3); it needs torch, pytest, pybind11, cmake and a C++ compiler.
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

# Only files that hold such tests are collected: the others may import packages that this machine lacks.
mapfile -t files < <(grep -rlE 'mark\.gpu|pytestmark.*gpu' tests --include='test_*.py' | sort)
if ((${#files[@]})); then
  echo "== pytest -m gpu ${files[*]}"
  # A file that cannot be collected here is reported and fails the run, after all others have run. Exit status 5
  # says that nothing was selected.
  "$python" -m pytest -m gpu -rs --continue-on-collection-errors "${files[@]}" || (($? == 5)) || failed+=("pytest -m gpu")
else
  echo "== no test is marked gpu"
fi

mkdir -p bench/results
benches=("$@")
if ((${#benches[@]} == 0)); then
  mapfile -t benches < <(grep -lF -e '[--json]' bench/*.py | xargs -r -n1 basename -s .py | sort)
fi
for name in "${benches[@]}"; do
  echo "== python -m bench.$name --json > bench/results/$name.json"
  if "$python" -m "bench.$name" --json >"bench/results/$name.json.tmp"; then
    mv "bench/results/$name.json.tmp" "bench/results/$name.json"
    cat "bench/results/$name.json"
  else
    rm -f "bench/results/$name.json.tmp"
    failed+=("bench.$name")
  fi
done

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[*]}" >&2
  exit 1
fi
