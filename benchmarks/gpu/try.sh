#!/usr/bin/env bash
# Tries the script of the GPU table without a GPU: a Python 3.12 environment with what the GPU machine has and the
# wheels of prepare.sh, everything on a tiny model. With --peers also the torch side, where torch is installed there.
#
#     benchmarks/gpu/try.sh OUT [--peers]
set -euo pipefail
cd "$(dirname "$0")/../.."
out="$1"
shift
venv="${VENV:-$PWD/.cache/gpu-venv}"
if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON312:-python3.12}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r benchmarks/gpu/requirements.txt
fi
# Not pydantic, which a dependency may have brought: on the GPU machine it comes from the wheels.
"$venv/bin/python" -m pip uninstall --quiet --yes pydantic pydantic_core
PYTHON="$venv/bin/python" benchmarks/gpu/prepare.sh
rm -rf "$out"
JAX_PLATFORMS=cpu PYTHON="$venv/bin/python" LIMIT_S=1200 benchmarks/gpu/run.sh "$out" --tiny "$@"
