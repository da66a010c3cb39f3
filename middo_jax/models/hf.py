"""Hugging Face directories: safetensors -> parameters and back, read off the table in parameters.py.

Loading is streamed and sharded: each device's part of each parameter is sliced out of the files, so that
no host ever holds the whole model. Exporting gathers one layer's tensor at a time.
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

import jax
import ml_dtypes
import numpy as np
import safetensors
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from middo_jax.config import ConfigError
from middo_jax.models.config import DecoderConfig, read_config
from middo_jax.models.decoder import Decoder, abstract
from middo_jax.models.parameters import ParameterSpec, parameters
from middo_jax.parallel.mesh import RULES
from middo_jax.run_dir import write_json

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# What a model directory holds besides its weights and config.json.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


class CheckpointError(ValueError):
    """A model's files are missing, damaged or not those that its config describes; names file and tensor."""


def load(
    directory: str | Path, dtype: str = "float32", param_dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef[Decoder], nnx.State, DecoderConfig]:
    """Loads a Hugging Face directory.

    Args:
      directory: holds config.json and safetensors in float32, float16 or bfloat16, one file or several.
      dtype: what forward passes compute in.
      param_dtype: what the parameters are stored in; None is `dtype`.
      mesh: where the parameters lie, each device reading its part only; None is the default device.

    Raises:
      CheckpointError: a file or tensor is missing, surplus, damaged or of the wrong shape or dtype.
      UnsupportedModel: the config asks for what the decoder does not compute.
      ConfigError: a parameter does not divide by the mesh.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json there; it is not a Hugging Face model directory")
    config = read_config(directory, dtype)
    if mesh is not None:
        _check_divisible(config, mesh)
    weights = _Weights(directory)
    weights.check(config)
    stored = np.dtype(param_dtype or dtype)
    values = {spec.path: _load_parameter(spec, config, stored, weights, mesh) for spec in parameters(config)}
    graphdef, shapes = abstract(config)
    return graphdef, nnx.map_state(lambda path, param: param.replace(values[path]), shapes), config


def _check_divisible(config: DecoderConfig, mesh: Mesh) -> None:
    for spec in parameters(config):
        for axis, size in zip(spec.axes, spec.shape(config), strict=True):
            mesh_axes = getattr(RULES, axis) or ()
            if size % math.prod(mesh.shape[name] for name in mesh_axes):
                wanted = ", ".join(f"mesh.{name}={mesh.shape[name]}" for name in mesh_axes)
                raise ConfigError(
                    f"config: {wanted} does not divide axis {axis!r} ({size}) "
                    f"of parameter {'.'.join(spec.path)}"
                )


def _load_parameter(
    spec: ParameterSpec, config: DecoderConfig, dtype: np.dtype, weights: _Weights, mesh: Mesh | None
) -> jax.Array:
    shape = spec.shape(config)
    # Devices along `data` hold the same part: it is read once.
    parts: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(shape)
        key = tuple(s.indices(size) for s, size in zip(index, shape, strict=True))
        if key not in parts:
            parts[key] = _read_part(spec, shape, dtype, weights, index)
        return parts[key]

    if mesh is None:
        return jax.device_put(part(None))
    return jax.make_array_from_callback(shape, spec.sharding(mesh), part)


def _read_part(
    spec: ParameterSpec, shape: tuple[int, ...], dtype: np.dtype, weights: _Weights, index: tuple[slice, ...]
) -> np.ndarray:
    """The part of a parameter at `index`, its layers stacked and its matrices transposed."""
    if not spec.is_stacked:
        return weights.read(spec.hf_name, index).astype(dtype, copy=False)
    within = index[:0:-1] if spec.transposed else index[1:]
    out = np.empty([len(range(size)[s]) for size, s in zip(shape, index, strict=True)], dtype)
    for layer, row in zip(range(shape[0])[index[0]], out, strict=True):
        tensor = weights.read(spec.hf_name.format(layer=layer), within)
        row[...] = tensor.T if spec.transposed else tensor
    return out


class _Weights:
    """The tensors of a directory's safetensors files; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._listing = directory / _INDEX_FILE
        if self._listing.is_file():
            files = _indexed_files(self._listing)
        else:
            self._listing = directory / _SINGLE_FILE
            files = [self._listing]
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{directory}: {file.name} is missing; weights must be safetensors")
            try:
                self._open[file] = safetensors.safe_open(file, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: truncated or not a safetensors file: {error}") from error
            self._file_of.update(dict.fromkeys(self._open[file].keys(), file))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads only the bytes of this slice."""
        return self._tensor(name)[index]

    def check(self, config: DecoderConfig) -> None:
        """Raises CheckpointError unless exactly the config's tensors are there, with its shapes."""
        shapes = {name: shape for name, shape, *_ in tensor_table(config)}
        for name, shape in shapes.items():
            if name not in self._file_of:
                raise CheckpointError(f"{self._listing}: tensor {name} is missing")
            tensor = self._tensor(name)
            if tuple(tensor.get_shape()) != shape:
                raise CheckpointError(
                    f"{self._file_of[name]}: tensor {name} has shape {tuple(tensor.get_shape())}, "
                    f"config.json implies {shape}"
                )
            if tensor.get_dtype() not in _DTYPES:
                raise CheckpointError(
                    f"{self._file_of[name]}: tensor {name} has dtype {tensor.get_dtype()}, "
                    f"supported: {', '.join(_DTYPES)}"
                )
        for name in self._file_of.keys() - shapes.keys():
            # Old exports carry RoPE's constants, and a tied head a second time.
            if not name.endswith(".rotary_emb.inv_freq") and name != "lm_head.weight":
                raise CheckpointError(
                    f"{self._file_of[name]}: tensor {name} is not part of config.json's model"
                )

    def _tensor(self, name: str) -> Any:
        return self._open[self._file_of[name]].get_slice(name)


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {type(error).__name__}: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not a plain file name")
    return [index.parent / name for name in names]


def tensor_table(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...], ParameterSpec, int | None]]:
    """(Hugging Face name, Hugging Face shape, parameter, layer) of every tensor, layer by layer."""

    def shape(spec: ParameterSpec) -> tuple[int, ...]:
        own = spec.shape(config)[spec.is_stacked :]
        return own[::-1] if spec.transposed else own

    specs = parameters(config)
    first_stacked = next(i for i, spec in enumerate(specs) if spec.is_stacked)
    stacked = [spec for spec in specs if spec.is_stacked]
    for spec in specs[:first_stacked]:
        yield spec.hf_name, shape(spec), spec, None
    for layer in range(config.num_layers):
        for spec in stacked:
            yield spec.hf_name.format(layer=layer), shape(spec), spec, layer
    for spec in specs[first_stacked + len(stacked) :]:
        yield spec.hf_name, shape(spec), spec, None


def export(
    params: nnx.State,
    config: DecoderConfig,
    source_dir: str | Path,
    out_dir: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes parameters as a Hugging Face directory that transformers, vLLM and `load` read.

    In a program of several processes all must call it; the first one writes.

    Args:
      params: what `load` returned, or what became of it by training; sharded or not.
      config: of the same model.
      source_dir: the directory it was loaded from; config.json and the tokenizer's files are copied.
      out_dir: must not exist, or be empty; it appears only once it is complete.
      dtype: float32, bfloat16 or float16; None keeps each parameter's own.
      max_shard_bytes: weights are split into files of at most this size (but one tensor each at least).

    Raises:
      FileExistsError: out_dir holds something.
      CheckpointError: source_dir has no config.json.
    """
    source_dir, out_dir = Path(source_dir), Path(out_dir)
    values = {path: param[...] for path, param in params.flat_state()}

    def tensor(name: str, shape: tuple[int, ...], spec: ParameterSpec, layer: int | None) -> LazyTensor:
        value = values[spec.path]
        wanted = np.dtype(dtype or value.dtype)

        def read() -> np.ndarray:
            array = _to_host(value if layer is None else value[layer]).astype(wanted, copy=False)
            return array.T if spec.transposed else array

        return LazyTensor(name, shape, wanted, read)

    tensors = [tensor(*row) for row in tensor_table(config)]
    if jax.process_index() == 0:
        with new_directory(out_dir) as directory:
            _copy_companions(source_dir, directory, str(tensors[0].dtype))
            write_weights(directory, tensors, max_shard_bytes)
    else:
        for each in tensors:
            each.read()  # gathering is collective
    multihost_utils.sync_global_devices("export")


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _copy_companions(source: Path, directory: Path, dtype: str) -> None:
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source}: no config.json there, so that none can be exported")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # transformers 5 writes `dtype`, 4 wrote `torch_dtype`.
    config.update(dict.fromkeys(config.keys() & {"dtype", "torch_dtype"} or {"dtype"}, dtype))
    write_json(directory / "config.json", config)
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


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


def write_weights(directory: Path, tensors: Sequence[LazyTensor], max_shard_bytes: int) -> None:
    """Writes model.safetensors, or several files and their index, holding one tensor in memory at a time."""
    shards: list[list[LazyTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return _write_file(directory / _SINGLE_FILE, tensors)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard)
        weight_map.update({tensor.name: name for tensor in shard})
    total = sum(tensor.nbytes for tensor in tensors)
    write_json(directory / _INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path: Path, tensors: Sequence[LazyTensor]) -> None:
    """Header length, JSON header, bytes; the safetensors library writes only what is in memory as a whole."""
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


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path`, renamed to it once the block has ended well.

    Raises:
      FileExistsError: `path` is there and holds something.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory; choose another or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes 0700, which would surprise who shares a model
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
