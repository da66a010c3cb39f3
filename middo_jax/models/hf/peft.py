"""LoRA adapters as a PEFT directory: adapter_config.json and adapter_model.safetensors, both directions.

It is what `peft.PeftModel.from_pretrained` opens and what vLLM serves beside the base model.
"""

from __future__ import annotations

import json
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
from middo_jax.models.lora import partition
from middo_jax.models.model import Params, by_path, with_values
from middo_jax.models.parameters import LORA_TARGETS, adapters
from middo_jax.parallel.hosts import to_host, to_mesh
from middo_jax.rundir import write_json

_CONFIG = "adapter_config.json"
_STEM = "adapter_model"
# Fields that would change what is computed, and the values with which they do not.
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
    # PiSSA and its like change the base's weights too.
    ("init_lora_weights", (True, False, "gaussian", "orthogonal", "eva")),
)
# Fields that do not change what is computed from the tensors: how it was trained, or where it comes from.
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
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # with the fields of _ONLY, unused
    }
)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / _CONFIG).is_file()


def read_adapter_config(directory: Path) -> tuple[str, Lora]:
    """(what its base model is called, the adapters' shape) of a PEFT directory.

    Which matrices have an adapter is read off the tensors: `target_modules` may be a pattern.

    Raises:
      CheckpointError: a file is missing or damaged, or the base is not named.
      UnsupportedModel: the adapter is of a kind that the decoder does not compute.
    """
    path = directory / _CONFIG
    try:
        fields = dict(json.loads(path.read_text(encoding="utf-8")))
        base, rank, alpha = fields["base_model_name_or_path"], int(fields["r"]), float(fields["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a LoRA config: {type(error).__name__}: {error}") from error
    for field, values in _ONLY:
        if fields.get(field, values[0]) not in values:
            raise UnsupportedModel(f"{path}: {field}={fields[field]!r} is not supported, only {values[0]!r}")
    for field in sorted(fields.keys() - _WITHOUT_EFFECT - {name for name, _ in _ONLY}):
        if fields[field] not in (None, False, "", [], {}):
            raise UnsupportedModel(f"{path}: {field}={fields[field]!r} is not supported")
    if not base:
        raise CheckpointError(f"{path}: base_model_name_or_path is empty; say there which model it adapts")
    found = {name.rsplit(".", 3)[-3] for name in Weights(directory, _STEM).tensors}
    targets = tuple(name for name in LORA_TARGETS if name in found)
    # Rank-stabilised adapters (arXiv 2312.03732) are weighed alpha / sqrt(rank).
    return base, Lora(rank, alpha * rank**0.5 if fields.get("use_rslora") else alpha, targets)


def load_adapters(directory: Path, config: DecoderConfig, mesh: Mesh, dtype: str = "float32") -> Params:
    """Reads the adapters of a PEFT directory onto a mesh.

    Args:
      directory: the PEFT directory.
      config: of the base, with the adapters that `read_adapter_config` has found.
      mesh: where they shall lie.
      dtype: what they are stored in.

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
    """Writes a model's adapters as a PEFT directory, with the tokenizer that they were trained with.

    In a program of several processes all must call it; the first one writes.

    Args:
      params: with or without the base's.
      config: of the same model, with its adapters.
      base: the Hugging Face directory of the base. The adapter names it; where it lies in the hub's cache, by
        its repo id.
      out_dir: must not exist, or be empty; it appears only once it is complete.
      dtype: float32, bfloat16 or float16; None keeps each adapter's own.
      chat_template: what the model was trained with; None is the base's own.

    Raises:
      FileExistsError: out_dir holds something.
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
    """Raises CheckpointError unless exactly the table's tensors are there, with its shapes."""
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
