"""Fuzzes `middo serve` with requests that schemathesis makes from the server's own description.

    python -m benchmarks serving_fuzz [--seconds 600]

The server is a process of its own with a tiny random model. Requests are valid and invalid ones, in
sequences. Faults are: a status of 500 or more, an invalid request that is accepted, a valid one that is
refused, and a response that does not match the description. Afterwards the server must give the answers
that it gave before. Prints schemathesis' report and the memory before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.serving_load import alone, serving

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "unsupported_method",
)


def fuzz(port: int, seconds: float, folder: Path, workers: int) -> int:
    """schemathesis' exit status; it writes its report to stdout."""
    config = folder / "schemathesis.toml"
    # A prompt over the context, or a token id over the vocabulary, is valid by its types: 400 is right there.
    config.write_text(
        '[checks.positive_data_acceptance]\nexpected-statuses = ["2xx", 400]\n', encoding="utf-8"
    )
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "--no-color", "fuzz"]
    command += [f"http://127.0.0.1:{port}/openapi.json", "--checks", ",".join(CHECKS)]
    command += ["--max-time", f"{seconds:g}", "--continue-on-failure", "--workers", str(workers)]
    return subprocess.run([*command, "--suppress-health-check", "all"], cwd=folder, check=False).returncode


def main() -> None:
    """Fuzzes, and fails if schemathesis found a fault or the server answers differently afterwards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        expected, before = asyncio.run(alone(server.port)), server.megabytes
        status = fuzz(server.port, options.seconds, Path(folder), options.workers)
        same = asyncio.run(alone(server.port)) == expected
        print(f"memory: {before:.1f} MB before, {server.megabytes:.1f} MB after")
        print("the server gives the same answers as before" if same else "the server gives OTHER answers")
    sys.exit(status or not same)


if __name__ == "__main__":
    main()
