"""How long a save holds up a training, against the steps between two saves.

    python -m benchmarks saving --model DIR [--steps 3] [--save-every 50]

A state of the model's size (weights and AdamW's moments in float32) is saved as a training would,
synchronously and asynchronously; a step is one row of 256 tokens a device: any real one is longer, and the
share smaller.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from middo_jax.config import TrainSettings
from middo_jax.models.loading import load, locate
from middo_jax.models.model import Params
from middo_jax.parallel.mesh import batch_divisor, make_mesh
from middo_jax.training.checkpoint import TrainingCheckpoints, TrainState
from middo_jax.training.optimizer import abstract_opt_state, make_optimizer
from middo_jax.training.step import Batch, abstract_batch, make_train_step

LENGTH = 256


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=50)
    given = parser.parse_args()
    mesh = make_mesh()
    settings = TrainSettings(batch_size=batch_divisor(mesh), schedule="constant")
    model = load(locate(given.model), "float32", mesh=mesh)
    graphdef, params = model.graphdef, model.params
    optimizer = make_optimizer(settings, 100)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_opt_state(optimizer, params, mesh))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    n_bytes = sum(x.nbytes for x in jax.tree.leaves((params, opt_state)))
    step = make_train_step(graphdef, settings, 100, chunk=LENGTH, state=(params, opt_state))
    batch = Batch(
        *(
            jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)
            for x in abstract_batch(settings, LENGTH, mesh)
        )
    )
    batch = batch._replace(segment_ids_bt=batch.segment_ids_bt * 0)
    seconds: list[float] = []
    with jax.set_mesh(mesh):
        for _ in range(given.steps + 1):
            began = time.perf_counter()
            params, opt_state, outputs = step(params, opt_state, Params({}), batch)
            outputs.loss.block_until_ready()
            seconds.append(time.perf_counter() - began)
        step_s = statistics.median(seconds[1:])  # the first compiles
        found: dict[str, object] = {
            "device": jax.devices()[0].device_kind,
            "state_gib": n_bytes / 2**30,
            "step_s": step_s,
        }
        for name, asynchronous in (("synchronous", False), ("asynchronous", True)):
            directory = tempfile.mkdtemp(prefix="saving")
            try:
                with TrainingCheckpoints(directory, "benchmark", asynchronous=asynchronous) as checkpoints:
                    began = time.perf_counter()
                    checkpoints.save(TrainState(1, params, opt_state))
                    held_s = time.perf_counter() - began
                whole_s = time.perf_counter() - began
            finally:
                shutil.rmtree(directory)
            share = held_s / (held_s + given.save_every * step_s)
            found[name] = {"held_up_s": held_s, "until_written_s": whole_s, "share": share}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
