"""Searches meshes and settings by compiling: the fastest mesh that fits, the nearest setting that does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from jax.sharding import Mesh

from middo_jax.config import Config, ConfigError
from middo_jax.models.config import DecoderConfig
from middo_jax.parallel.mesh import batch_divisor
from middo_jax.planning.amounts import batch_tokens_of
from middo_jax.planning.automatic import (
    LEAST,
    SATURATED,
    SHARE,
    Placement,
    bytes_beside,
    micro_batches_and_remat,
    with_changes,
)
from middo_jax.planning.chips import Slices
from middo_jax.planning.stages import PlannedStage, Tell, Workload, plan_stage

MeshShape = tuple[int, int, int]
MakeMesh = Callable[[MeshShape], Mesh]
TRIES = 6  # settings that are compiled at most for one program


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A setting with which a stage fits.

    Attributes:
      changes: settings to change, as on the command line.
      stage: the stage with them.
    """

    changes: tuple[str, ...]
    stage: PlannedStage


def candidate_meshes(slices: Slices, decoder: DecoderConfig, config: Config) -> list[MeshShape]:
    """Meshes that the model and the batch divide: tensor 1, 2, 4 and 8, the rest fsdp, slices along data.

    Tensor parallelism splits key/value heads, so it is at most their number.
    """
    inside, found = slices.devices // slices.count, []
    parts = config.train.gradient_accumulation
    rows = config.train.batch_size // (1 if parts == "auto" else parts)
    for tensor in (1, 2, 4, 8):
        fsdp = inside // tensor
        divides = inside % tensor == 0 and decoder.num_kv_heads % tensor == 0
        if divides and decoder.hidden_size % fsdp == 0 and rows % (slices.count * fsdp) == 0:
            found.append((slices.count, fsdp, tensor))
    return found


def best_mesh(workload: Workload, make: MakeMesh, tell: Tell) -> tuple[MeshShape, PlannedStage] | None:
    """The mesh with the fastest training among those that fit, and that training; None if none fits.

    Raises:
      ConfigError: no mesh divides the batch and the model.
    """
    assert workload.slices is not None
    shapes = candidate_meshes(workload.slices, workload.decoder, workload.config)
    if not shapes:
        raise ConfigError(
            f"config: no mesh of {workload.slices.devices} devices divides the model and train.batch_size="
            f"{workload.config.train.batch_size} / train.gradient_accumulation="
            f"{workload.config.train.gradient_accumulation}; make the rows of a micro-batch a multiple of "
            f"{workload.slices.devices // 8}, or give --mesh"
        )
    tried = []
    for shape in shapes:
        tell(f"mesh data={shape[0]} fsdp={shape[1]} tensor={shape[2]}")
        mesh = make(shape)
        try:
            stage = plan_stage("train", with_training(workload, mesh), mesh, tell)
        except ConfigError as error:  # no micro-batch fits
            tell(str(error))
            continue
        if stage.seconds is not None:
            tried.append((stage.seconds, shape, stage))
    if not tried:
        return None
    _, shape, stage = min(tried, key=lambda one: one[0])
    return shape, stage


def with_training(workload: Workload, mesh: Mesh) -> Workload:
    """The workload with the fastest `train.gradient_accumulation` and `train.remat` that fit, where auto.

    Raises:
      ConfigError: none of them fits.
    """
    if "auto" not in (workload.config.train.gradient_accumulation, workload.config.train.remat):
        return workload
    changes = micro_batches_and_remat(
        workload.config, workload.decoder, Placement(mesh, workload.chip.usable_bytes)
    )
    return workload.changed(changes)


def plan_passes(
    names: Sequence[str], workload: Workload, mesh: Mesh, tell: Tell
) -> tuple[Workload, list[PlannedStage]]:
    """Plans the scoring passes, with the `scoring.batch_tokens` that a run would choose if it is auto.

    Args:
      names: score, rate, both or none.
      workload: what is planned.
      mesh: the devices.
      tell: called with a line before each compilation.

    Returns:
      The workload with the number, and the stages in the order of `names`.
    """
    is_auto, tokens = workload.config.scoring.batch_tokens == "auto", SATURATED
    beside = bytes_beside(workload.config, workload.decoder, mesh) if is_auto else 0.0
    while True:
        tried = (
            workload.changed([f"scoring.batch_tokens={tokens * batch_divisor(mesh)}"])
            if is_auto
            else workload
        )
        found: dict[str, PlannedStage] = {}
        for name in sorted(names):  # ratings first: they need more memory
            found[name] = plan_stage(name, tried, mesh, tell)
            used, usable = found[name].memory.used, workload.chip.usable_bytes
            if is_auto and tokens > LEAST and used + beside > SHARE * usable:
                break
        else:
            return tried, [found[name] for name in names]
        tokens //= 2


def nearest_fitting(name: str, workload: Workload, mesh: Mesh, make: MakeMesh, tell: Tell) -> Remedy | None:
    """The first change of settings with which a stage fits, found by compiling; None if none of them does."""
    for tries, (changes, config, shape) in enumerate(_changes(name, workload, mesh)):
        if tries == TRIES:
            return None
        tell(f"{name} does not fit; trying {' '.join(changes)}")
        stage = plan_stage(name, dataclasses.replace(workload, config=config), make(shape), tell)
        if stage.seconds is not None:
            return Remedy(changes, stage)
    return None


def _changes(
    name: str, workload: Workload, mesh: Mesh
) -> Iterator[tuple[tuple[str, ...], Config, MeshShape]]:
    """Settings to try, those that cost the least time first. Each keeps the ones before it."""
    shape: MeshShape = mesh.devices.shape
    changes: tuple[str, ...] = ()
    for change in (_training_changes if name == "train" else _pass_changes)(workload, mesh):
        kept = tuple(c for c in changes if c.partition("=")[0] != change.partition("=")[0])
        changes = (*kept, change)
        yield changes, with_changes(workload.config, changes), shape
    data, fsdp, tensor = shape
    while tensor < 8 and fsdp % 2 == 0 and workload.decoder.num_kv_heads % (2 * tensor) == 0:
        fsdp, tensor = fsdp // 2, tensor * 2
        mesh_changes = *changes, f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"
        yield mesh_changes, with_changes(workload.config, changes), (data, fsdp, tensor)


def _training_changes(workload: Workload, mesh: Mesh) -> Iterator[str]:
    settings, ways = workload.config.train, batch_divisor(mesh)
    if settings.recomputed != "layer":
        yield "train.remat=layer"
    parts = settings.micro_batches
    while settings.batch_size % (2 * parts * ways) == 0:
        parts *= 2
        yield f"train.gradient_accumulation={parts}"
    if workload.config.scoring.unembed_chunk > 128:
        yield "scoring.unembed_chunk=128"


def _pass_changes(workload: Workload, mesh: Mesh) -> Iterator[str]:
    tokens = batch_tokens_of(workload.config)
    least = 256 * batch_divisor(mesh)
    while tokens > least:
        tokens = max(least, tokens // 2)
        yield f"scoring.batch_tokens={tokens}"
    if workload.config.scoring.unembed_chunk > 128:
        yield "scoring.unembed_chunk=128"
