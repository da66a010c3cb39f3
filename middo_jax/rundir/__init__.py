"""A run's folder: its paths, how its files are written, and which stages are done or stale, and why.

layout.py: paths. files.py: atomic writing. manifest.py: records of finished stages. link.py: when a stage is
stale. chain.py: all stages, what each reads, writes and depends on. lock.py: one writing process at a time.
"""

from middo_jax.rundir.files import (
    atomic,
    file_hash,
    json_line,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from middo_jax.rundir.layout import RoundDir, RunDir, local
from middo_jax.rundir.lock import RunLocked, held
from middo_jax.rundir.manifest import Manifest, RunError, fingerprint

__all__ = [
    "Manifest",
    "RoundDir",
    "RunDir",
    "RunError",
    "RunLocked",
    "atomic",
    "file_hash",
    "fingerprint",
    "held",
    "json_line",
    "local",
    "read_jsonl",
    "write_json",
    "write_jsonl",
    "write_text",
]
