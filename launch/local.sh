#!/usr/bin/env bash
# Runs the loop on this machine: all its devices, or a CPU.
#   launch/local.sh configs/quickstart.yaml rounds=2
# Started again after an interruption, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${MIDDO:-.venv/bin/middo}" run "$@"
