#!/usr/bin/env bash
# The whole GPU table in one call: correctness first, then every job in a process of its own, then the table.
#
#     benchmarks/gpu/run.sh OUT [JOB ...]        all jobs, or those named; --tiny as a job: what a CPU bears
#
# Needs Python 3.12 with jax for CUDA, flax, optax, orbax, transformers, and for the peers torch; the rest comes
# from benchmarks/gpu/wheels (see prepare.sh). OUT/results.json keeps every figure as soon as it is there: the
# same command goes on where it was cut, and LIMIT_S ends it in time.
set -euo pipefail
cd "$(dirname "$0")/../.."
out="$1"
shift
python="${PYTHON:-python3}"
if ! "$python" -c 'import pydantic' 2>/dev/null; then
  site="$(mktemp -d)"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" benchmarks/gpu/wheels/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
# Level 2 tries every product's candidates, but does not compare their results: half the time to compile.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=2" TF_CPP_MIN_LOG_LEVEL=2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
exec "$python" -W ignore -m benchmarks.gpu.run --out "$out" --limit "${LIMIT_S:-360}" "$@"
