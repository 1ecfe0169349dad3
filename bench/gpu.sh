#!/usr/bin/env bash
# What needs a GPU, on a machine that has one and nothing of ours; nothing is fetched.
#     bench/gpu.sh first             # 7 minutes: what is worth most (bench/gpu_plan.py has the parts and their seconds)
#     bench/gpu.sh second            # the rest in order of value, as far as 5 1/2 minutes go
#     bench/gpu.sh forward_60 tests  # parts by name, however long they take, and the build where one of them needs it
# Options go to bench.gpu_session: --plan prints the seconds, --dry rehearses on a CPU, --results DIR (else $OUT, else
# bench/results/gpu), --seconds N. DIR/results.json holds all results in one file. PYTHON chooses the interpreter
# (default python3); it needs torch, triton, transformers, pytest, pybind11, cmake and a C++ compiler. Other packages
# come from the wheels that bench/gpu_wheels.sh fetches into .wheels beforehand, and are installed into build/gpu/site.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
site="$PWD/build/gpu/site"
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Two threads that spin for work on a busy machine slow small models down a hundredfold.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

needed=(diffusers omegaconf peft pydantic tenacity)
has_all() {
  "$python" -c 'import sys, importlib.util as u; sys.exit(any(u.find_spec(n) is None for n in sys.argv[1:]))' "${needed[@]}"
}
if ! has_all; then
  if ! compgen -G ".wheels/*.whl" >/dev/null; then
    echo "bench/gpu.sh: one of ${needed[*]} is not installed and .wheels is empty; run bench/gpu_wheels.sh where there is a network, and bring .wheels along" >&2
    exit 2
  fi
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .wheels/*.whl
  has_all || { echo "bench/gpu.sh: .wheels lacks one of ${needed[*]}; run bench/gpu_wheels.sh again" >&2; exit 2; }
fi

"$python" - <<'PY'
import torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, GPU: {gpu}")
PY
exec "$python" -m bench.gpu_session "$@"
