#!/usr/bin/env bash
# Fetches into .wheels (ignored by git) what a GPU machine of Python 3.12 with torch, triton, transformers and the usual
# packages lacks, in the versions of requirements/cpu.lock; bench/gpu.sh installs from there without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
names=(annotated-types diffusers importlib_metadata lazy-importer omegaconf peft pydantic pydantic_core tenacity torchao
  typing-inspection typing_extensions)
pinned=()
for name in "${names[@]}"; do
  # The lock spells some names with - and others with _.
  line="$(grep -iE "^${name//[-_]/[-_]}==" requirements/cpu.lock)" || { echo "requirements/cpu.lock lacks $name" >&2; exit 1; }
  pinned+=("$line")
done
rm -rf .wheels
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 \
  --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 --platform any -d .wheels "${pinned[@]}"
ls -l .wheels
bytes="$(cat .wheels/*.whl | wc -c)"
echo "$((bytes / 1000000)) MB in ${#names[@]} wheels"
# A working tree of 64 MiB is what may travel to such a machine.
((bytes < 60000000)) || { echo "over 60 MB; leave something out" >&2; exit 1; }
