"""Out-of-memory errors: adds the memory that the step needs and the settings that would lower it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from middo_jax.config import AdamW, TrainSettings
from middo_jax.parallel.mesh import batch_divisor

_GIB = 2**30


class OutOfMemory(RuntimeError):
    """The training step does not fit the device; the message says what it needs and what to change."""


@contextlib.contextmanager
def out_of_memory_explained(settings: TrainSettings, mesh: Mesh, compiled: Any = None) -> Iterator[None]:
    """Turns an out-of-memory error of the block into `OutOfMemory`.

    Args:
      settings: training settings.
      mesh: device mesh of the training.
      compiled: the compiled step, for its `memory_analysis`; None during compilation.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        first = str(error).partition("\n")[0]
        needs = "" if compiled is None else f" {needed(compiled)}{_available(mesh)}."
        raise OutOfMemory(
            f"the training step does not fit the memory of {mesh.local_devices[0].device_kind}.{needs} "
            f"What would lower it, the cheapest first: {'; '.join(remedies(settings, mesh))}. ({first})"
        ) from error


def needed(compiled: Any) -> str:
    """Returns a sentence: the memory per device that a compiled step needs, from the compiler's analysis."""
    sizes = compiled.memory_analysis()
    kept = (sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes) / _GIB
    passing = sizes.temp_size_in_bytes / _GIB
    return (
        f"It takes {kept:.2f} GiB for parameters, optimizer and batch and {passing:.2f} GiB for gradients "
        "and activations per device"
    )


def _available(mesh: Mesh) -> str:
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    return f"; there are {limit / _GIB:.2f} GiB" if limit else ""


def remedies(settings: TrainSettings, mesh: Mesh) -> list[str]:
    """Returns settings that lower memory; first those that do not change the result of training."""
    rows = settings.batch_size // settings.micro_batches
    divisor = batch_divisor(mesh)
    found = []
    if settings.remat != "layer":
        found.append("train.remat=layer")
    if rows > divisor:
        # The most micro-batches that still divide the batch: one row per device.
        found.append(
            f"a larger train.gradient_accumulation ({settings.gradient_accumulation} now, up to "
            f"{settings.batch_size // divisor})"
        )
    if mesh.shape["data"] > 1:
        found.append(f"mesh.fsdp instead of mesh.data={mesh.shape['data']}")
    found.append("a smaller scoring.unembed_chunk or model.max_length")
    if isinstance(settings.optimizer, AdamW):
        found.append("train.optimizer=adafactor")
    if settings.param_dtype == "float32":
        found.append("train.param_dtype=bfloat16")
    found.append("adapters (lora.rank=16)")
    return found
