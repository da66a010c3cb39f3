#!/usr/bin/env bash
# Fetches what the GPU machine lacks, to travel with the working tree: wheels, and a tokenizer for the ratings.
#
#     benchmarks/gpu/prepare.sh [MODEL]
#
# MODEL is a Hugging Face directory whose tokenizer is taken; by default the demo model that `make` installs.
# It fills benchmarks/gpu/wheels and benchmarks/gpu/tokenizer, which git ignores.
set -euo pipefail
cd "$(dirname "$0")"
model="${1:-../../models/SmolLM2-135M-Instruct}"
python="${PYTHON:-python3}"
rm -rf wheels tokenizer
# pydantic for the settings; the others that a GPU image may lack are imported only where they are used.
"$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --dest wheels \
  --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
  pydantic
mkdir tokenizer
cp "$model"/tokenizer*.json "$model"/config.json tokenizer/
cp "$model"/chat_template.jinja tokenizer/ 2>/dev/null || true
du -sh wheels tokenizer
