"""What the readings beside the loss cost in the scoring pass, in seconds.

    python -m benchmarks readings_cost --data alpaca.json --model models/SmolLM2-135M-Instruct

Runs the pass over the first rows in turns, without and with the prompts' losses (`prompt_nll`), and prints
each time, compiling left out. `end_nll` and `worst_decile_nll` come with every pass: their operations are
compiled alone and timed on a batch of 2 x 1,024 tokens with 128 samples per row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from middo_jax.config import load
from middo_jax.data.sources import read
from middo_jax.data.tokenize import tokenize_all
from middo_jax.passes import losses
from middo_jax.progress import Silent, for_stderr
from middo_jax.session import Session

BATCH, LENGTH, SEGMENTS = 2, 1024, 128
CALLS = 50


def own_operations() -> float:
    """Seconds per batch, the median of CALLS calls."""
    rng = np.random.default_rng(0)
    segment_bt = np.sort(rng.integers(0, SEGMENTS, (BATCH, LENGTH)), axis=1).astype(np.int32)
    is_target_bt = rng.random((BATCH, LENGTH)) < 0.6
    nll_bt = jnp.asarray(rng.gamma(1.0, size=(BATCH, LENGTH)), jnp.float32)
    nothing = jnp.zeros((BATCH, LENGTH), jnp.int32)
    batch = losses.LossInputs(
        nothing, jnp.asarray(segment_bt), nothing, nothing, jnp.asarray(is_target_bt), nothing > 0
    )

    @jax.jit
    def readings(nll_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_segment_bts = batch.segment_ids_bt[..., None] == jnp.arange(SEGMENTS)
        target_bts = of_segment_bts & batch.is_target_bt[..., None]
        return losses._of_last(nll_bt, target_bts), losses._worst_decile(nll_bt, batch, SEGMENTS)

    jax.block_until_ready(readings(nll_bt))
    seconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        jax.block_until_ready(readings(nll_bt))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    """Times and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True, help="A Hugging Face directory.")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()

    settings = (f"model.path={arguments.model}", "data.path=none", "model.dtype=float32")
    session = Session(load(None, settings), for_stderr())
    model = session.load_model(Path(arguments.model))
    examples = read(arguments.data)[0][: arguments.rows]
    tokenized = tokenize_all(examples, session.tokenizer, session.config.model.max_length)
    chunk = session.config.scoring.unembed_chunk
    sides = {
        name: losses.LossPass(tokenized, model, session.batch_tokens, chunk, prompts=name == "with prompts")
        for name in ("loss alone", "with prompts")
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    real_tokens: dict[str, int] = {}
    for _ in range(arguments.turns):
        for name, loss_pass in sides.items():
            _, facts = loss_pass(model, Silent(), name)
            seconds[name].append(facts.seconds)
            real_tokens[name] = facts.real_tokens
    for name, values in seconds.items():
        print(f"{name}: {' '.join(f'{value:.2f}' for value in values)} s, {real_tokens[name]:,} tokens")
    print(
        f"end_nll and worst_decile_nll alone: {own_operations() * 1e3:.2f} ms per batch of {BATCH * LENGTH:,}"
    )


if __name__ == "__main__":
    main()
