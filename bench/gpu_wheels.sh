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
# 64 MiB may travel to such a machine, and what git tracks travels along.
tracked="$(git ls-files -z | "$python" -c 'import os, sys
names = filter(None, sys.stdin.buffer.read().split(b"\0"))
print(sum(os.lstat(name).st_size for name in names if os.path.lexists(name)))')"
room="$(((64 << 20) - tracked))"
echo "$bytes bytes in ${#names[@]} wheels; $room fit beside the $tracked that git tracks"
((bytes <= room)) || { echo "$((bytes - room)) bytes too many; leave something out" >&2; exit 1; }
