"""LoRA adapters as a PEFT directory: adapter_config.json and adapter_model.safetensors, both directions.

`peft.PeftModel.from_pretrained` opens such a directory, and vLLM serves it beside the base model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from middo_jax.models.config import DecoderConfig, Lora, UnsupportedModel
from middo_jax.models.decoder import abstract
from middo_jax.models.finite import not_finite
from middo_jax.models.hf.companions import write_tokenizer
from middo_jax.models.hf.files import (
    DTYPES,
    CheckpointError,
    LazyTensor,
    Weights,
    new_directory,
    write_weights,
)
from middo_jax.models.hf.layout import TensorRow, turned
from middo_jax.models.limits import MAX_PATH, shown
from middo_jax.models.lora import partition
from middo_jax.models.model import Params, by_path, with_values
from middo_jax.models.parameters import LORA_TARGETS, adapters
from middo_jax.parallel.hosts import to_host, to_mesh
from middo_jax.rundir import write_json
from middo_jax.rundir.nesting import require_flat

_CONFIG = "adapter_config.json"
_MAX_RANK = 1 << 16
_STEM = "adapter_model"
# Fields that could change the computation, and the values with which they do not.
_ONLY: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("peft_type", ("LORA",)),
    ("bias", ("none",)),
    ("use_dora", (False,)),
    ("lora_bias", (False,)),
    ("fan_in_fan_out", (False,)),
    ("modules_to_save", (None, [])),
    ("rank_pattern", ({}, None)),
    ("alpha_pattern", ({}, None)),
    ("layer_replication", (None, [])),
    ("trainable_token_indices", (None, [])),
    # PiSSA and similar methods also change the base's weights.
    ("init_lora_weights", (True, False, "gaussian", "orthogonal", "eva")),
)
# Fields that do not affect the computation: how the adapter was trained, or where it comes from.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
        *(
            "layers_to_transform",
            "lora_alpha",
            "lora_dropout",
            "megatron_core",
            "peft_version",
            "qalora_group_size",
        ),
        *("r", "revision", "runtime_config", "target_modules", "task_type", "use_rslora"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # unused with _ONLY's values
    }
)


def is_adapter(directory: Path) -> bool:
    """Whether a directory contains a PEFT adapter."""
    return (directory / _CONFIG).is_file()


def read_adapter_config(directory: Path) -> tuple[str, Lora]:
    """(name of the base model, shape of the adapters) of a PEFT directory.

    The tensors determine which matrices have an adapter, because `target_modules` may be a pattern.

    Raises:
      CheckpointError: a file is missing or damaged, or the base is not named.
      UnsupportedModel: the decoder does not compute this kind of adapter.
    """
    path = directory / _CONFIG
    try:
        text = path.read_bytes()
        require_flat(text)
        fields = json.loads(text.decode())
        if not isinstance(fields, dict):
            raise TypeError("it must be a JSON object")
        base, rank, alpha = fields["base_model_name_or_path"], int(fields["r"]), float(fields["lora_alpha"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        said = f"{type(error).__name__}: {error}"[:300]
        raise CheckpointError(f"{path}: not a LoRA config: {said}") from error
    if not 1 <= rank <= _MAX_RANK or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: r={rank} and lora_alpha={alpha} are not valid: both must be over 0")
    for field, values in _ONLY:
        if fields.get(field, values[0]) not in values:
            raise UnsupportedModel(
                f"{path}: {field}={shown(fields[field])} is not supported, only {values[0]!r}"
            )
    for field in sorted(fields.keys() - _WITHOUT_EFFECT - {name for name, _ in _ONLY}):
        if fields[field] not in (None, False, "", [], {}):
            raise UnsupportedModel(f"{path}: {field[:100]}={shown(fields[field])} is not supported")
    if not base or not isinstance(base, str) or len(base) > MAX_PATH:
        what = "is no path" if base else "is empty"
        raise CheckpointError(f"{path}: base_model_name_or_path {what}; set it to the model that it adapts")
    # The name before `.lora_A.weight`; `load_adapters` refuses a tensor that has none.
    found = {part for name in Weights(directory, _STEM).tensors for part in name.split(".")[-3:-2]}
    targets = tuple(name for name in LORA_TARGETS if name in found)
    # Rank-stabilised adapters (arXiv 2312.03732) have the weight alpha / sqrt(rank).
    return base, Lora(rank, alpha * rank**0.5 if fields.get("use_rslora") else alpha, targets)


def load_adapters(directory: Path, config: DecoderConfig, mesh: Mesh, dtype: str = "float32") -> Params:
    """Reads the adapters of a PEFT directory onto a mesh.

    Args:
      directory: the PEFT directory.
      config: the base's config with the adapters found by `read_adapter_config`.
      mesh: mesh to put the adapters on.
      dtype: dtype of the adapters in memory.

    Returns:
      The adapters alone.

    Raises:
      CheckpointError: a tensor is missing, surplus, not finite, or does not fit the base.
    """
    weights, table = Weights(directory, _STEM), list(_adapter_table(config))
    _check(weights, table)
    tensors: dict[tuple[str, ...], list[np.ndarray]] = {}
    for row in table:
        [tensor] = weights.read(row.name, [tuple(map(range, row.shape))])
        if not np.isfinite(tensor).all():
            raise CheckpointError(not_finite(weights.tensors[row.name].file, [row.name]))
        tensors.setdefault(row.spec.path, []).append(tensor.T.astype(dtype))
    values = {spec.path: to_mesh(mesh, np.stack(tensors[spec.path]), *spec.axes) for spec in adapters(config)}
    targets, _ = partition(abstract(config)[1], config)
    return with_values(targets, values)


def export_adapters(
    params: Params,
    config: DecoderConfig,
    base: Path,
    out_dir: Path,
    dtype: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes a model's adapters as a PEFT directory, with the tokenizer used in training.

    In a program of several processes all must call it; the first one writes.

    Args:
      params: the adapters' parameters, with or without the base's.
      config: the model's config, with its adapters.
      base: Hugging Face directory of the base. The adapter names it by path, or by repo id if it is in the
        hub's cache.
      out_dir: directory that is missing or empty; it appears only once it is complete.
      dtype: float32, bfloat16 or float16; None keeps each adapter's dtype.
      chat_template: chat template used in training; None: the base's own.

    Raises:
      FileExistsError: out_dir is not empty.
    """
    assert config.lora is not None
    values = by_path(params)
    tensors = [_lazy(row, values[row.spec.path], dtype) for row in _adapter_table(config)]
    if jax.process_index() == 0:
        with new_directory(out_dir) as directory:
            write_json(directory / _CONFIG, _adapter_config(config.lora, base))
            write_tokenizer(base, directory, chat_template)
            write_weights(directory, tensors, sum(tensor.nbytes for tensor in tensors), _STEM)
    else:
        for each in tensors:
            each.read()  # gathering is collective
    multihost_utils.sync_global_devices("export_adapters")


def _adapter_config(lora: Lora, base: Path) -> dict[str, Any]:
    cached = re.search(r"/models--([^/]+)/snapshots/[^/]+$", base.as_posix())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cached[1].replace("--", "/") if cached else str(base),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _adapter_table(config: DecoderConfig) -> Iterator[TensorRow]:
    for layer in range(config.num_layers):
        for spec in adapters(config):
            _, inputs, outputs = spec.shape(config)
            yield TensorRow(spec.hf_name.format(layer=layer), (outputs, inputs), spec, layer)


def _lazy(row: TensorRow, stacked: jax.Array, dtype: str | None) -> LazyTensor:
    wanted = np.dtype(dtype or stacked.dtype)

    def read() -> np.ndarray:
        return to_host(turned(stacked[row.layer], row.spec.transposed, wanted))

    return LazyTensor(row.name, row.shape, wanted, read)


def _check(weights: Weights, table: list[TensorRow]) -> None:
    """Raises CheckpointError unless the tensors and their shapes are exactly the table's."""
    shapes = {row.name: row.shape for row in table}
    for name, shape in shapes.items():
        if name not in weights.tensors:
            raise CheckpointError(f"{weights.listing}: tensor {name} is missing")
        tensor = weights.tensors[name]
        if tensor.shape != shape or tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is {tensor.dtype} {tensor.shape}, the base model and "
                f"{_CONFIG} imply {shape} in one of {', '.join(DTYPES)}"
            )
    for name in weights.tensors.keys() - shapes.keys():
        raise CheckpointError(f"{weights.tensors[name].file}: tensor {name} adapts nothing of the base model")
