"""Safetensors files: tensors read in parts, and written one at a time.

Why not with the safetensors library: it maps whole files into memory, where all that was ever read of them
stays resident, and it writes only what is in memory as a whole. The format is a length, a JSON header and the
bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from middo_jax.rundir import write_json
from middo_jax.rundir.files import full_disk_named, temporary_prefix
from middo_jax.rundir.leftovers import sweep_beside

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BLOCK_BYTES = 1 << 24
_ALIGNMENT = 64  # of arrays that a CPU device takes as they are; others it copies


class CheckpointError(ValueError):
    """A model's files are missing, damaged or not those that its config describes; names file and tensor."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `dtype` is the format's code, `start` counts bytes from the file's beginning."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class Weights:
    """The tensors of a directory's safetensors files; nothing is read before it is asked for.

    Attributes:
      listing: the file that says which tensors there are: the index, or the only file.
      tensors: what there is, by name.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        """`stem` is what the files' names begin with."""
        self.listing = directory / f"{stem}.safetensors.index.json"
        named: dict[str, str] = {}
        if self.listing.is_file():
            named = _read_index(self.listing)
            files = [directory / name for name in sorted(set(named.values()))]
        else:
            self.listing = directory / f"{stem}.safetensors"
            files = [self.listing]
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{directory}: {file.name} is missing; weights must be safetensors")
            for name, tensor in _read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{file}: tensor {name} is here and in {self.tensors[name].file.name}"
                    )
                self.tensors[name] = tensor
        for name, file in named.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(f"{self.listing}: tensor {name} is not in {file}")

    def read(self, name: str, parts: Sequence[tuple[range, ...]]) -> list[np.ndarray]:
        """Parts of a tensor, a range an axis, each in memory of its own; no byte is read twice.

        Raises:
          CheckpointError: the file ends before the tensor does.
        """
        dtype = DTYPES[self.tensors[name].dtype]
        arrays = [_aligned_empty([len(along) for along in part], dtype) for part in parts]
        first_row, end_row = min(rows.start for rows, *_ in parts), max(rows.stop for rows, *_ in parts)
        for start, block in self.blocks(name, first_row, end_row):
            for (rows, *others), array in zip(parts, arrays, strict=True):
                first, end = max(start, rows.start), min(start + len(block), rows.stop)
                if first < end:
                    cut = (slice(first - start, end - start), *(slice(r.start, r.stop) for r in others))
                    array[first - rows.start : end - rows.start] = block[cut]
        return arrays

    def blocks(self, name: str, first: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of its first row, rows) of a tensor's rows [first, end); the next block overwrites it."""
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
        buffer = np.empty((max(1, min(_BLOCK_BYTES // row_bytes, end - first)), *tensor.shape[1:]), dtype)
        with tensor.file.open("rb") as file:
            file.seek(tensor.start + first * row_bytes)
            for start in range(first, end, len(buffer)):
                block = buffer[: end - start]
                if file.readinto(block.view(np.uint8).data) != block.nbytes:
                    raise CheckpointError(f"{tensor.file}: truncated while tensor {name} was read")
                yield start, block


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return memory[offset : offset + size].view(dtype).reshape(shape)


def _read_index(index: Path) -> dict[str, str]:
    """Tensor -> name of its file, which must lie beside the index."""
    try:
        named = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        strange = [name for name in named.values() if Path(name).name != name or name in ("", "..")]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {type(error).__name__}: {error}") from error
    if strange:
        raise CheckpointError(f"{index}: {strange[0]!r} is not a plain file name")
    if not named:
        raise CheckpointError(f"{index}: names no tensor")
    return named


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, whose bytes must follow each other and end with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: truncated or not a safetensors file")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = sorted(
            (*map(int, entry["data_offsets"]), name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        )
        begin = end = 8 + length
        tensors = {}
        for start, stop, name, dtype, shape in entries:
            if begin + start != end or (
                dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize
            ):
                raise CheckpointError(f"{path}: tensor {name} does not lie where the header says")
            tensors[name], end = StoredTensor(path, dtype, shape, begin + start), begin + stop
            if end > size:
                raise CheckpointError(f"{path}: truncated: tensor {name} ends at byte {end:,} of {size:,}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from error
    if end != size:
        raise CheckpointError(f"{path}: {size - end:,} bytes behind the last tensor")
    return tensors


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written, made by `read` when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    directory: Path, tensors: Sequence[LazyTensor], max_shard_bytes: int, stem: str = "model"
) -> None:
    """Writes STEM.safetensors, or several files and their index, holding one tensor in memory at a time."""
    shards: list[list[LazyTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return _write_file(directory / f"{stem}.safetensors", tensors)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard)
        weight_map.update({tensor.name: name for tensor in shard})
    total = sum(tensor.nbytes for tensor in tensors)
    index = directory / f"{stem}.safetensors.index.json"
    write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path: Path, tensors: Sequence[LazyTensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPE_CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read(), tensor.dtype)
            if array.shape != tensor.shape:
                raise CheckpointError(
                    f"tensor {tensor.name} has shape {array.shape}, expected {tensor.shape}"
                )
            file.write(array.view(np.uint8).data)


def require_vacant(path: Path) -> None:
    """Raises FileExistsError if `path` is there and holds something."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory; choose another or remove it")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path`, renamed to it once the block has ended well.

    Raises:
      FileExistsError: `path` is there and holds something.
      DiskFull: there is no room for it.
    """
    require_vacant(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_beside(path)  # a killed export has left a copy of the whole model
    with full_disk_named(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=temporary_prefix(path)))
    try:
        with full_disk_named(path):
            yield temporary
            temporary.chmod(0o755)  # mkdtemp makes 0700, which would surprise who shares a model
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
