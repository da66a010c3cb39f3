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
    Place,
    bytes_beside,
    micro_batches_and_remat,
    with_changes,
)
from middo_jax.planning.chips import Slices
from middo_jax.planning.stages import Job, Stage, Tell, plan_stage

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
    stage: Stage


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


def best_mesh(job: Job, make: MakeMesh, tell: Tell) -> tuple[MeshShape, Stage] | None:
    """The mesh with the fastest training among those that fit, and that training; None if none fits.

    Raises:
      ConfigError: no mesh divides the batch and the model.
    """
    assert job.slices is not None
    shapes = candidate_meshes(job.slices, job.decoder, job.config)
    if not shapes:
        raise ConfigError(
            f"config: no mesh of {job.slices.devices} devices divides the model and train.batch_size="
            f"{job.config.train.batch_size} / train.gradient_accumulation="
            f"{job.config.train.gradient_accumulation}; make the rows of a micro-batch a multiple of "
            f"{job.slices.devices // 8}, or give --mesh"
        )
    tried = []
    for shape in shapes:
        tell(f"mesh data={shape[0]} fsdp={shape[1]} tensor={shape[2]}")
        mesh = make(shape)
        try:
            stage = plan_stage("train", with_training(job, mesh), mesh, tell)
        except ConfigError as error:  # no micro-batch fits
            tell(str(error))
            continue
        if stage.seconds is not None:
            tried.append((stage.seconds, shape, stage))
    if not tried:
        return None
    _, shape, stage = min(tried, key=lambda one: one[0])
    return shape, stage


def with_training(job: Job, mesh: Mesh) -> Job:
    """The job with the fastest `train.gradient_accumulation` and `train.remat` that fit, where they are auto.

    Raises:
      ConfigError: none of them fits.
    """
    if "auto" not in (job.config.train.gradient_accumulation, job.config.train.remat):
        return job
    changes = micro_batches_and_remat(job.config, job.decoder, Place(mesh, job.chip.usable_bytes))
    return job.changed(changes)


def plan_passes(names: Sequence[str], job: Job, mesh: Mesh, tell: Tell) -> tuple[Job, list[Stage]]:
    """Plans the scoring passes, with the `scoring.batch_tokens` that a run would choose if it is auto.

    Args:
      names: score, rate, both or none.
      job: what is planned.
      mesh: the devices.
      tell: called with a line before each compilation.

    Returns:
      The job with the number, and the stages in the order of `names`.
    """
    is_auto, tokens = job.config.scoring.batch_tokens == "auto", SATURATED
    beside = bytes_beside(job.config, job.decoder, mesh) if is_auto else 0.0
    while True:
        tried = job.changed([f"scoring.batch_tokens={tokens * batch_divisor(mesh)}"]) if is_auto else job
        found: dict[str, Stage] = {}
        for name in sorted(names):  # ratings first: they need more memory
            found[name] = plan_stage(name, tried, mesh, tell)
            used, usable = found[name].memory.used, job.chip.usable_bytes
            if is_auto and tokens > LEAST and used + beside > SHARE * usable:
                break
        else:
            return tried, [found[name] for name in names]
        tokens //= 2


def nearest_fitting(name: str, job: Job, mesh: Mesh, make: MakeMesh, tell: Tell) -> Remedy | None:
    """The first change of settings with which a stage fits, found by compiling; None if none of them does."""
    for tries, (changes, config, shape) in enumerate(_changes(name, job, mesh)):
        if tries == TRIES:
            return None
        tell(f"{name} does not fit; trying {' '.join(changes)}")
        stage = plan_stage(name, dataclasses.replace(job, config=config), make(shape), tell)
        if stage.seconds is not None:
            return Remedy(changes, stage)
    return None


def _changes(name: str, job: Job, mesh: Mesh) -> Iterator[tuple[tuple[str, ...], Config, MeshShape]]:
    """Settings to try, those that cost the least time first. Each keeps the ones before it."""
    shape: MeshShape = mesh.devices.shape
    changes: tuple[str, ...] = ()
    for change in (_training_changes if name == "train" else _pass_changes)(job, mesh):
        kept = tuple(c for c in changes if c.partition("=")[0] != change.partition("=")[0])
        changes = (*kept, change)
        yield changes, with_changes(job.config, changes), shape
    data, fsdp, tensor = shape
    while tensor < 8 and fsdp % 2 == 0 and job.decoder.num_kv_heads % (2 * tensor) == 0:
        fsdp, tensor = fsdp // 2, tensor * 2
        mesh_changes = *changes, f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"
        yield mesh_changes, with_changes(job.config, changes), (data, fsdp, tensor)


def _training_changes(job: Job, mesh: Mesh) -> Iterator[str]:
    settings, ways = job.config.train, batch_divisor(mesh)
    if settings.recomputed != "layer":
        yield "train.remat=layer"
    parts = settings.micro_batches
    while settings.batch_size % (2 * parts * ways) == 0:
        parts *= 2
        yield f"train.gradient_accumulation={parts}"
    if job.config.scoring.unembed_chunk > 128:
        yield "scoring.unembed_chunk=128"


def _pass_changes(job: Job, mesh: Mesh) -> Iterator[str]:
    tokens = batch_tokens_of(job.config)
    least = 256 * batch_divisor(mesh)
    while tokens > least:
        tokens = max(least, tokens // 2)
        yield f"scoring.batch_tokens={tokens}"
    if job.config.scoring.unembed_chunk > 128:
        yield "scoring.unembed_chunk=128"
