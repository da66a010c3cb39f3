"""Hugging Face directories: safetensors -> parameters and back, by the table in parameters.py."""

from middo_jax.models.hf.companions import ChatFormat
from middo_jax.models.hf.exporting import export
from middo_jax.models.hf.files import (
    CheckpointError,
    LazyTensor,
    new_directory,
    require_vacant,
    write_weights,
)
from middo_jax.models.hf.layout import tensor_table
from middo_jax.models.hf.loading import load
from middo_jax.models.hf.peft import export_adapters, is_adapter, load_adapters, read_adapter_config
from middo_jax.models.hf.verifying import Expectation, Verification, expect, obstacle

__all__ = [
    "ChatFormat",
    "CheckpointError",
    "Expectation",
    "LazyTensor",
    "Verification",
    "expect",
    "export",
    "export_adapters",
    "is_adapter",
    "load",
    "load_adapters",
    "new_directory",
    "obstacle",
    "read_adapter_config",
    "require_vacant",
    "tensor_table",
    "write_weights",
]
