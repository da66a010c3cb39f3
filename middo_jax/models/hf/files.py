"""Safetensors files: tensors read in parts, and written one at a time.

The safetensors library is not used: it maps whole files into memory, where all pages once read stay resident,
and it writes only tensors that are all in memory. The format is a length, a JSON header and the bytes.
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
from middo_jax.rundir.leftovers import remove_leftovers_beside
from middo_jax.rundir.nesting import require_flat

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 16_000_000  # about 100,000 tensors; the format allows 100 MB, which take a GB to read
_MAX_AXES = 8
_BLOCK_BYTES = 1 << 24
_ERROR_CHARS = 200  # shown of a damaged file's error, which may quote the file
_ALIGNMENT = 64  # bytes; a CPU device uses aligned arrays without copying


class CheckpointError(ValueError):
    """A model's files are missing, damaged or do not match its config; the message names file and tensor."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor: `dtype` is the format's code, `start` the offset in the file in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class Weights:
    """The tensors of a directory's safetensors files; their data is read on demand.

    Attributes:
      listing: the file that lists the tensors: the index, or the only file.
      tensors: the tensors by name.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        """`stem` is the beginning of the files' names."""
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
        """Reads parts of a tensor, one range per axis, each into its own memory; no byte is read twice.

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
        """Yields (index of the first row, rows) for the rows [first, end); the next block overwrites it."""
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
    """Tensor -> name of its file, which must be in the index's directory."""
    try:
        text = index.read_bytes()
        require_flat(text)
        named = dict(json.loads(text.decode())["weight_map"])
        strange = [name for name in named.values() if Path(name).name != name or name in ("", "..")]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {type(error).__name__}: {error}") from error
    if strange:
        raise CheckpointError(f"{index}: {strange[0]!r} is not a plain file name")
    if not named:
        raise CheckpointError(f"{index}: names no tensor")
    return named


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file; their bytes must be contiguous and end with the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: truncated or not a safetensors file")
        text = file.read(length)
    try:
        require_flat(text)
        header = json.loads(text.decode())
        header.pop("__metadata__", None)
        entries = sorted(
            (*map(int, entry["data_offsets"]), name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        )
        begin = end = 8 + length
        tensors = {}
        for start, stop, name, dtype, shape in entries:
            if len(shape) > _MAX_AXES:
                raise CheckpointError(f"{path}: tensor {name} has {len(shape):,} axes")
            if (
                min(shape, default=0) < 0
                or begin + start != end
                or stop < start
                or (dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize)
            ):
                raise CheckpointError(f"{path}: tensor {name} is not where the header places it")
            tensors[name], end = StoredTensor(path, dtype, shape, begin + start), begin + stop
            if end > size:
                raise CheckpointError(f"{path}: truncated: tensor {name} ends at byte {end:,} of {size:,}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: truncated or not a safetensors file: {str(error)[:_ERROR_CHARS]}"
        ) from error
    if end != size:
        raise CheckpointError(f"{path}: {size - end:,} bytes behind the last tensor")
    return tensors


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written; `read` produces its value when it is needed."""

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
    """Writes STEM.safetensors, or several files and their index, with one tensor in memory at a time."""
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
    """Raises FileExistsError if `path` exists and is not an empty directory."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory; choose another or remove it")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path`, renamed to `path` when the block succeeds.

    Raises:
      FileExistsError: `path` is there and holds something.
      DiskFull: there is no room for it.
    """
    require_vacant(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers_beside(path)  # a killed export has left a copy of the whole model
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
