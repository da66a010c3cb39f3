"""Values for settings that are `auto`: tokens per scoring batch, micro-batches, remat, tensor parallelism.

Each is found by compiling the program and reading its memory, so it holds for the kernel, the mesh and the
chip in use. Where no limit of memory is known, as on a CPU, each is the value that suits a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from middo_jax.config import Config, ConfigError, ExpectedRating, layers_of, load
from middo_jax.data.packing import ROW
from middo_jax.models.config import DecoderConfig
from middo_jax.models.model import abstract_model
from middo_jax.parallel.coordination import from_first
from middo_jax.parallel.mesh import batch_divisor, make_mesh
from middo_jax.planning.amounts import tree_size
from middo_jax.planning.compiling import memory_of_program
from middo_jax.planning.programs import BatchShape, Program, device_bytes, rating, scoring, training

ON_CPU = 2048  # tokens of a scoring batch
# Tokens per device. More make no pass faster: every weight that is read from memory or gathered from other
# devices is used so often that the matmuls take longer.
SATURATED, LEAST = 16_384, 1024
MICRO_BATCH = 4096  # tokens per device of a micro-batch; below, reading and gathering weights takes longer
SHARE = 0.9  # of the memory; the rest is for fragments, and for programs that are not compiled here
TARGETS = 0.55  # share of positions that are targets; no program's memory depends on it


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where programs run.

    Attributes:
      mesh: the devices.
      usable: bytes per device that programs may use; None: no limit is known.
    """

    mesh: Mesh
    usable: float | None

    def fits(self, program: Program, beside: float = 0.0) -> bool:
        """Whether a program fits beside so many bytes of other arrays; without a limit it does."""
        if self.usable is None:
            return True
        return memory_of_program(program, self.mesh, self.usable).used + beside <= SHARE * self.usable


def usable_bytes() -> float | None:
    """The smallest memory of this process's devices, equal in all processes; None on a CPU."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    known = [float(limit) for limit in limits if limit]
    return from_first("memory of the devices", lambda: min(known) if known else None)


def settled(config: Config, decoder: Callable[[], DecoderConfig], place: Placement) -> Config:
    """The settings with values in place of `auto`, but for the mesh, which is that of `place`.

    Args:
      config: the settings.
      decoder: returns the model, with the adapters of the settings; called only if something is compiled.
      place: devices and their memory.

    Raises:
      ConfigError: training fits with none of the values.
    """
    changes: list[Any] = []
    if config.mesh.tensor == "auto":
        changes.append(f"mesh.tensor={place.mesh.shape['tensor']}")
    if "auto" in (config.train.gradient_accumulation, config.train.remat):
        changes += (
            _for_cpu(config) if place.usable is None else micro_batches_and_remat(config, decoder(), place)
        )
    if config.scoring.batch_tokens == "auto":
        changes.append(f"scoring.batch_tokens={batch_tokens(config, decoder, place)}")
    return with_changes(config, changes)


def with_changes(config: Config, changes: Sequence[str]) -> Config:
    """The settings with some of them changed, written as on the command line."""
    return load(None, [*layers_of(config), *changes]) if changes else config


def changed_settings(before: Config, after: Config) -> list[str]:
    """The settings whose values differ, with those of `after`, written as on the command line."""
    found = []
    for group in ("mesh", "train", "scoring"):
        old, new = getattr(before, group), getattr(after, group)
        names = type(new).model_fields
        changed = [name for name in names if getattr(old, name) != getattr(new, name)]
        found += [f"{group}.{name}={getattr(new, name)}" for name in changed]
    return found


def batch_tokens(config: Config, decoder: Callable[[], DecoderConfig], place: Placement) -> int:
    """Tokens of a scoring batch, all devices together: as many as make the passes fast and fit.

    Room is left for a second model, as the embedded refiner is, and for the state of a training that measures
    the held-out loss meanwhile.
    """
    if place.usable is None:
        return ON_CPU
    ways, tokens, model = batch_divisor(place.mesh), SATURATED, decoder()
    base, beside = dataclasses.replace(model, lora=None), bytes_beside(config, model, place.mesh)
    while tokens > LEAST:
        programs = _passes(config, base, place.mesh, tokens)
        if all(place.fits(program, beside) for program in programs):
            break
        tokens //= 2
    return tokens * ways


def bytes_beside(config: Config, decoder: DecoderConfig, mesh: Mesh) -> float:
    """Bytes per device of what may be in memory beside a pass: a second model, or the state of a training."""
    base = dataclasses.replace(decoder, lora=None)
    second = device_bytes(abstract_model(base, mesh, config.model.dtype).params)
    if config.train.eval_every is None:
        return second
    kept = _training(config, decoder, mesh, "layer", config.train.batch_size // batch_divisor(mesh)).parts
    return max(second, kept["parameters"] + kept["optimizer"])


def _passes(config: Config, base: DecoderConfig, mesh: Mesh, tokens: int) -> list[Program]:
    """The passes over the longest texts: the programs with the most memory."""
    longest = max(ROW, 1 << (config.model.max_length - 1).bit_length())

    def rows(length: int) -> BatchShape:
        return BatchShape(batch_divisor(mesh) * max(1, tokens // length), length, length, TARGETS)

    found = [scoring(config, base, mesh, rows(longest), 1.0)]
    if isinstance(config.quality.rating, ExpectedRating):
        prefix, fixed, per_token = tree_size()
        size = round(fixed + per_token * config.model.max_length) + prefix
        found.append(rating(config, base, mesh, rows(max(ROW, 1 << (size - 1).bit_length())), prefix, 1.0))
    return found


def _for_cpu(config: Config) -> tuple[str, ...]:
    settings = config.train
    remat = "layer" if settings.remat == "auto" else settings.remat
    parts = 1 if settings.gradient_accumulation == "auto" else settings.gradient_accumulation
    return f"train.remat={remat}", f"train.gradient_accumulation={parts}"


def micro_batches_and_remat(config: Config, decoder: DecoderConfig, place: Placement) -> tuple[str, ...]:
    """The fastest values of `train.remat` and `train.gradient_accumulation` that fit, as changes of settings.

    Less recomputation comes first, since more micro-batches cost little as long as each is large.

    Raises:
      ConfigError: none of them fits, or the mesh does not divide the batch.
    """
    assert place.usable is not None
    needed: dict[str, float] = {}  # bytes of the activations of a whole step, by remat
    for remat, parts in _training_choices(config, place.mesh):
        program = _training(config, decoder, place.mesh, remat, parts)
        kept = sum(program.parts.values())
        if remat in needed and kept + needed[remat] / parts > SHARE * place.usable:
            continue
        used = memory_of_program(program, place.mesh, place.usable).used
        if used <= SHARE * place.usable:
            return f"train.remat={remat}", f"train.gradient_accumulation={parts}"
        needed[remat] = (used - kept) * parts
    raise ConfigError(
        f"config: training does not fit the {place.usable / 2**30:.1f} GiB of a device with any "
        "train.gradient_accumulation and train.remat; more devices along mesh.fsdp or mesh.tensor, "
        "train.optimizer=adafactor, train.param_dtype=bfloat16 or adapters (lora.rank=16) need less"
    )


def _training_choices(config: Config, mesh: Mesh) -> Iterator[tuple[str, int]]:
    """(remat, micro-batches), the fastest first."""
    settings, ways = config.train, batch_divisor(mesh)
    remats = ("none", "dots", "layer") if settings.remat == "auto" else (settings.remat,)
    if settings.gradient_accumulation != "auto":
        parts = [settings.gradient_accumulation]
    else:
        parts = [n for n in range(1, settings.batch_size + 1) if settings.batch_size % (n * ways) == 0]
        if not parts:
            raise ConfigError(
                f"config: train.batch_size={settings.batch_size} is not a multiple of the {ways} devices "
                "along mesh.data and mesh.fsdp"
            )
    tokens = settings.batch_size * config.model.max_length / ways
    large = [n for n in parts if tokens / n >= MICRO_BATCH] or parts[:1]
    for remat in remats:
        yield from ((remat, n) for n in large)
    yield from ((remats[-1], n) for n in parts if n not in large)


def _training(config: Config, decoder: DecoderConfig, mesh: Mesh, remat: str, parts: int) -> Program:
    named = with_changes(config, [f"train.remat={remat}", f"train.gradient_accumulation={parts}"])
    return training(named, decoder, mesh, TARGETS, 1.0)


def tensor_size(config: Config, decoder: DecoderConfig, devices: Sequence[Any], usable: float | None) -> int:
    """The smallest tensor parallelism with which the mesh divides the batch and training fits.

    Raises:
      ConfigError: there is none.
    """
    for size in (1, 2, 4, 8):
        if len(devices) % size or decoder.num_kv_heads % size:
            continue
        settings = config.mesh.model_copy(update={"tensor": size})
        try:
            place = Placement(make_mesh(settings, devices), usable)
        except ConfigError:  # the axes that were given leave no room for this size
            continue
        ways = batch_divisor(place.mesh)
        if config.train.batch_size % ways:
            continue
        if place.fits(_training(config, decoder, place.mesh, "layer", config.train.batch_size // ways)):
            return size
    raise ConfigError(
        f"config: mesh.tensor=auto: with 1, 2, 4 and 8 of {len(devices)} devices along mesh.tensor the mesh "
        f"does not divide train.batch_size={config.train.batch_size}, or training does not fit"
    )
