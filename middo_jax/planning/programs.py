"""The programs of every stage, lowered with shapes only by the code that runs them: no weights, no data.

Axes: docs/contributing.md#axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from middo_jax.config import Config
from middo_jax.inference.programs import CHUNK, PromptChunk, decode, prefill
from middo_jax.inference.sampling import Request, Sampling
from middo_jax.models.attention.cached import CACHE_BLOCK
from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import KVCache, empty_cache
from middo_jax.models.hf.layout import turned
from middo_jax.models.lora import partition
from middo_jax.models.model import abstract_model
from middo_jax.models.parameters import parameters
from middo_jax.parallel.mesh import batch_divisor, fitting_spec, named_sharding
from middo_jax.passes.loss_plan import MIN_LENGTH
from middo_jax.passes.losses import LossInputs, score_batch
from middo_jax.passes.ratings import MIN_TREE, RatingInputs, RatingScale, judge_batch
from middo_jax.planning.roofline import Loop
from middo_jax.signals.judge.readout import EXPECTED
from middo_jax.signals.judge.rubrics import COLUMNS
from middo_jax.signals.neighbours import ring
from middo_jax.signals.neighbours.search import BLOCK
from middo_jax.training.checks import check_batch
from middo_jax.training.optimizer import abstract_opt_state, make_optimizer
from middo_jax.training.step import abstract_batch, make_train_step

STEPS = 1000  # of a training; enters the schedule only


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a stage.

    Attributes:
      name: what it computes, such as "rows of 1024, texts up to 256".
      lower: lowers it on the mesh that is set.
      runs: how often the stage runs it.
      loops: lengths of its loops that depend on data.
      window: how far back its attention looks; None: to the beginning of the row.
      parts: bytes per device of its arguments, by kind.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    runs: float = 1.0
    loops: Sequence[Loop] = ()
    window: int | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AnySpelling:
    """How a tokenizer spells the ratings: one token each. Which tokens does not matter for the time."""

    first: tuple[int, ...] = tuple(range(11))
    ten_second: int | None = None


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """A batch: rows, tokens per row, tokens of the longest text, share of positions with a target."""

    batch: int
    length: int
    longest: int
    target_share: float


def device_bytes(tree: Any) -> float:
    """Bytes per device of arrays that are shapes with shardings."""
    total = 0.0
    for x in jax.tree.leaves(tree):
        size = 1
        for n in x.sharding.shard_shape(x.shape):
            size *= n
        total += size * jnp.dtype(x.dtype).itemsize
    return total


def _on_rows(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> Any:
    sharding = named_sharding(mesh, "batch", *(None,) * (len(shape) - 1))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _head(rows: BatchShape, mesh: Mesh, chunk: int) -> Loop:
    """The loop over chunks of targets; each device has its share of the rows."""
    share = rows.batch // batch_divisor(mesh) * rows.length
    width = min(share, chunk)
    return Loop(r"\bhead\b", max(1.0, -(-share * rows.target_share // width)))


def scoring(config: Config, decoder: DecoderConfig, mesh: Mesh, rows: BatchShape, runs: float) -> Program:
    """The pass of losses and embeddings over packed rows."""
    model = abstract_model(decoder, mesh, config.model.dtype)
    shape = rows.batch, rows.length
    batch = LossInputs(
        *(_on_rows(mesh, *shape) for _ in range(4)),
        is_target_bt=_on_rows(mesh, *shape, dtype=jnp.bool_),
        in_prompt_bt=_on_rows(mesh, *shape, dtype=jnp.bool_),
    )
    static: dict[str, Any] = {
        "max_segments": rows.length // MIN_LENGTH,
        "chunk": config.scoring.unembed_chunk,
        "longest": rows.longest,
    }
    return Program(
        _named(rows),
        lambda: score_batch.lower(model.graphdef, model.params, batch, **static),
        runs,
        (_head(rows, mesh, config.scoring.unembed_chunk),),
        rows.longest,
        {"parameters": device_bytes(model.params)},
    )


def _named(rows: BatchShape) -> str:
    return f"{rows.batch} rows of {rows.length}, texts up to {rows.longest}"


def rating(
    config: Config, decoder: DecoderConfig, mesh: Mesh, rows: BatchShape, prefix: int, runs: float
) -> Program:
    """The pass of ratings: trees of questions, read in one prefill."""
    model = abstract_model(decoder, mesh, config.model.dtype)
    scale = RatingScale(AnySpelling(), EXPECTED, len(COLUMNS))
    shape, trees = (rows.batch, rows.length), max(1, rows.length // MIN_TREE)
    batch = RatingInputs(
        *(_on_rows(mesh, *shape) for _ in range(4)),
        reading_bsr=_on_rows(mesh, rows.batch, trees, scale.n_positions),
    )
    static: dict[str, Any] = {"scale": scale, "prefix": prefix, "longest": rows.longest}
    return Program(
        f"{_named(rows)}, prefix {prefix}",
        lambda: judge_batch.lower(model.graphdef, model.params, batch, **static),
        runs,
        window=rows.longest,
        parts={"parameters": device_bytes(model.params)},
    )


def neighbours(count: int, width: int, k: int, mesh: Mesh) -> list[Program]:
    """The search for nearest neighbours around the ring of devices."""
    found = []
    for name, (lowered, runs, tiles) in zip(
        ("products", "rows to the next device", "neighbours to the next device"),
        ring.lowered(count, width, k, mesh, BLOCK),
        strict=False,
    ):
        # In each tile every row takes up to k candidates.
        loops = Loop("while/body.*while", float(k)), Loop("while", tiles)
        found.append(Program(name, lambda lowered=lowered: lowered, runs, loops))
    return found


def training(config: Config, decoder: DecoderConfig, mesh: Mesh, target_share: float, runs: float) -> Program:
    """One optimizer step: of the adapters if the decoder has some, else of all weights.

    Raises:
      ConfigError: the mesh does not divide the batch or the model.
    """
    settings, length = config.train, config.model.max_length
    check_batch(settings, mesh)
    whole_dtype = settings.param_dtype if decoder.lora is None else "float32"
    model = abstract_model(decoder, mesh, whole_dtype)
    trained, _ = partition(model.params, decoder)
    _, frozen = partition(abstract_model(decoder, mesh, config.model.dtype).params, decoder)
    opt_state = abstract_opt_state(make_optimizer(settings, STEPS), trained, mesh)
    chunk = config.scoring.unembed_chunk
    step = make_train_step(
        model.graphdef, settings, STEPS, chunk=chunk, state=(trained, opt_state), longest=length
    )
    batch = abstract_batch(settings, length, mesh)
    micro = BatchShape(settings.batch_size // settings.micro_batches, length, length, target_share)
    gradients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), trained
    )
    return Program(
        f"{settings.micro_batches} x {micro.batch} rows of {length}, remat {settings.remat}",
        lambda: step.lower(trained, opt_state, frozen, batch),
        runs,
        (_head(micro, mesh, chunk),),
        length,
        {
            "parameters": device_bytes(trained) + device_bytes(frozen),
            "optimizer": device_bytes(opt_state),
            "gradients": device_bytes(gradients),
        },
    )


def engine(
    config: Config, decoder: DecoderConfig, mesh: Mesh, context: float, chunks: float, steps: float
) -> list[Program]:
    """The embedded engine: prefill of one chunk of a prompt, and one decode step of all slots.

    Args:
      config: `serve` has the slots and their length.
      decoder: the served model.
      mesh: its mesh.
      context: mean number of tokens that a decode step reads per slot.
      chunks: number of prefilled chunks.
      steps: number of decode steps.
    """
    model = abstract_model(decoder, mesh, config.model.dtype)
    slots, length = config.serve.max_batch, config.serve.max_context
    cache = _cache(decoder, mesh, slots, length)
    request = Request((), 0, temperature=config.refine.temperature)

    def arrays(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    number = jax.ShapeDtypeStruct((), jnp.int32)
    tokens_1t = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32)
    wants = jax.ShapeDtypeStruct((), jnp.bool_)
    chunk = PromptChunk(tokens_1t, tokens_1t, number, number, number, wants)
    slots_b = jax.ShapeDtypeStruct((slots,), jnp.int32)
    blocks = -(-context // min(CACHE_BLOCK, length))
    # Five groups of rounds of the random generator; a CPU's compiler hides their count.
    loops = (Loop("threefry", 5.0), Loop("while/body.*while", max(1.0, blocks)))
    parts = {"parameters": device_bytes(model.params), "cache": device_bytes(cache)}

    def lower_prefill() -> jax.stages.Lowered:
        return prefill.lower(model.graphdef, model.params, cache, chunk, arrays(Sampling.of([(request, 0)])))

    def lower_decode() -> jax.stages.Lowered:
        sampling = arrays(Sampling.of([(request, 1)] * slots))
        return decode.lower(model.graphdef, model.params, cache, slots_b, slots_b, sampling)

    return [
        Program(f"prefill of {CHUNK} tokens", lower_prefill, chunks, loops, parts=parts),
        Program(f"decode step of {slots} answers", lower_decode, steps, loops, parts=parts),
    ]


def _cache(decoder: DecoderConfig, mesh: Mesh, slots: int, length: int) -> KVCache:
    """The shape of the engine's cache, split as the engine does."""
    shapes = jax.eval_shape(lambda: empty_cache(decoder, slots, length))
    spec = fitting_spec(mesh, shapes.keys.shape, None, "batch", None, "kv_heads", None)
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def export(decoder: DecoderConfig, mesh: Mesh, dtype: str) -> list[Program]:
    """The export's gather: each parameter of one layer, cast, turned and replicated on every device."""
    found = []
    for spec in parameters(decoder):
        shape, axes = spec.shape(decoder), spec.axes
        runs = 1
        if spec.is_stacked:
            runs, shape, axes = shape[0], shape[1:], axes[1:]
        value = jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, *axes))
        everywhere = named_sharding(mesh, *(None,) * len(shape))

        def lower(value: Any = value, spec: Any = spec, everywhere: Any = everywhere) -> jax.stages.Lowered:
            def gathered(x: jax.Array) -> jax.Array:
                return turned(x, spec.transposed, jnp.dtype(dtype))

            return jax.jit(gathered, out_shardings=everywhere).lower(value)

        found.append(Program(f"gather of {spec.path[-1]}", lower, float(runs)))
    return found
