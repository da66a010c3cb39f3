"""A training of seconds: a tiny decoder, examples of uneven lengths and targets, and one call that runs it.

    params = fine_tune(tmp_path, examples(60), mesh=mesh_of(2, 2, 2))

As a program it is one process of several:

    python tiny_training.py OUT.npz DIRECTORY STOP ADDRESS PROCESSES PROCESS

STOP is kill:N or term:N, the step at which all of them are gone, or the last gets a SIGTERM; 0 for neither.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from middo_jax.config import AdamW, MeshSettings, TrainSettings
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.evaluation.heldout import HeldoutLoss, row_losses, total
from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import Decoder, split
from middo_jax.models.model import Model, Params
from middo_jax.parallel.hosts import to_host
from middo_jax.parallel.mesh import make_mesh
from middo_jax.passes.losses import score_examples
from middo_jax.training.hooks import on_metrics
from middo_jax.training.metrics import StepMetrics
from middo_jax.training.plan import TrainingPlan
from middo_jax.training.sft import train

CONFIG = DecoderConfig(96, 32, 64, 2, 4, 2, 8, 64)
PACK_LENGTH = 32
CHUNK = 16
# A small rate: Adam turns the rounding of a tiny gradient into a whole step of the size of the rate.
SETTINGS = TrainSettings(
    learning_rate=1e-3,
    batch_size=8,
    num_epochs=7,
    optimizer=AdamW(weight_decay=0.1),
    warmup_ratio=0.2,
    remat="none",
    save_every=4,
)


class Killed(BaseException):
    """Stands for a kill: nothing that the training could catch."""


def example(index: int, length: int, vocab_size: int = CONFIG.vocab_size) -> TokenizedExample:
    """Random tokens; a third to all but one of them are targets, by the index."""
    rng = np.random.default_rng(index)
    tokens_n = rng.integers(3, vocab_size, length).astype(np.int32)
    is_target_n = np.arange(length) >= max(1, length * (index % 3) // 3)
    return TokenizedExample(f"id{index}", tokens_n, is_target_n, ~is_target_n, False)


def examples(count: int, vocab_size: int = CONFIG.vocab_size) -> list[TokenizedExample]:
    """Of 4 to 28 tokens."""
    return [example(i, 4 + (7 * i) % 25, vocab_size) for i in range(count)]


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    """Over the first devices."""
    settings = MeshSettings(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(settings, jax.devices()[: data * fsdp * tensor])


def fresh_model(mesh: Mesh, config: DecoderConfig = CONFIG, seed: int = 0) -> Model:
    """A decoder of random parameters, which a training on `mesh` puts there."""
    graphdef, params = split(Decoder(config, jax.random.key(seed)))
    return Model(config, graphdef, params, mesh)


def heldout(model: Model, tokenized: Sequence[TokenizedExample], sources: Sequence[str] = ()) -> HeldoutLoss:
    """The model's loss on some examples, through the scoring pass."""
    scores, _ = score_examples(model, tokenized, batch_tokens=128, chunk=CHUNK)
    return total(row_losses([e.id for e in tokenized], scores.loss_n, scores.n_targets_n), sources)


def fine_tune(
    out_dir: Path,
    tokenized: Sequence[TokenizedExample],
    mesh: Mesh,
    settings: TrainSettings = SETTINGS,
    on_step: Callable[[StepMetrics], None] | None = None,
) -> Params:
    """Trains the tiny decoder, always from the same start."""
    plan = TrainingPlan(tokenized, settings, 3, PACK_LENGTH)
    hooks = [] if on_step is None else [on_metrics(on_step)]
    return train(fresh_model(mesh), plan, out_dir, chunk=CHUNK, hooks=hooks).params


def kill_at(step: int) -> Callable[[StepMetrics], None]:
    """For `on_step`: kills the training when it is told of this step."""

    def kill(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise Killed

    return kill


def terminate_at(step: int) -> Callable[[StepMetrics], None]:
    """For `on_step`: the scheduler takes the machine back at this step."""

    def terminate(metrics: StepMetrics) -> None:
        if metrics.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return terminate


def main() -> None:
    """Trains on a mesh (2, 2, 2), stops as it is told, or writes what it ended up with."""
    out, directory, stop, address, processes, process = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(process), initialization_timeout=120)
    assert len(jax.devices()) == 8
    assert jax.process_count() == int(processes)
    how, _, step = stop.partition(":")
    on_step = None
    if how == "kill":
        on_step = kill_at(int(step))
    if how == "term" and int(process) == int(processes) - 1:
        on_step = terminate_at(int(step))
    try:
        params = fine_tune(Path(directory), examples(40), mesh_of(2, 2, 2), on_step=on_step)
    except Killed:
        return
    leaves = jax.tree.leaves(to_host(params))
    np.savez(out, *leaves)


if __name__ == "__main__":
    main()
