"""How exactly is each family loaded, packed and exported, and what does loading cost? Prints two tables.

    python -m benchmarks families
    python -m benchmarks families --model models/SmolLM2-135M-Instruct --model models/gemma-3-270m-it

The first is over tiny random models of every family (tests/support): the largest difference of our
float32 logits and gradients from transformers', of packed from unpacked, and of the exported model, in
transformers, from our own forward, after all parameters were changed. The second is over the models that are
given: seconds to load in float32, and the process's peak memory beyond the parameters. Needs torch (the
`parity` extra) and Linux.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.forward import forward
from support.tiny_model import FAMILIES, write_tiny_model

from middo_jax.models.config import read_config
from middo_jax.models.hf import export, load, tensor_table
from middo_jax.models.model import Params, Structure, bound
from middo_jax.models.nll import target_nll_sum
from middo_jax.models.parameters import num_params


def logits_and_gradient(
    graphdef: Structure, params: Params, tokens_bt: np.ndarray
) -> tuple[np.ndarray, Params]:
    """(float32 [b, t, v], gradient of the mean NLL of every next token) of rows of one segment each."""
    segment_ids_bt = np.zeros_like(tokens_bt)
    positions_bt = np.broadcast_to(np.arange(tokens_bt.shape[1], dtype=np.int32), tokens_bt.shape)
    has_next_bt = positions_bt < tokens_bt.shape[1] - 1

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        model = bound(graphdef, params)
        hidden_btd = model.hidden(*map(jax.numpy.asarray, (tokens_bt, segment_ids_bt, positions_bt)))
        nll = target_nll_sum(
            model,
            hidden_btd,
            *map(jax.numpy.asarray, (np.roll(tokens_bt, -1, axis=1), has_next_bt)),
            chunk=64,
        )
        logits = model.unembed(hidden_btd.reshape(-1, hidden_btd.shape[-1]))
        return nll / has_next_bt.sum(), logits.reshape(*tokens_bt.shape, -1)

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(logits), gradient


def transformers_logits_and_gradient(
    directory: Path, tokens_bt: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same by transformers in float32, the gradient by tensor name."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ids = torch.from_numpy(tokens_bt.astype(np.int64))
    logits = model.eval()(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradient = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().numpy(), gradient


def errors(directory: Path, scratch: Path) -> dict[str, float]:
    """The row of one family."""
    loaded = load(directory)
    graphdef, params, config = loaded.graphdef, loaded.params, loaded.config
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, config.vocab_size, size=(2, 96), dtype=np.int32)
    ours, gradient = logits_and_gradient(graphdef, params, tokens)
    theirs, their_gradient = transformers_logits_and_gradient(directory, tokens)
    by_path = {path: np.asarray(value[...]) for path, value in gradient.flat_state()}

    def gradient_error(name: str, spec: Any, layer: int | None) -> float:
        own = by_path[spec.path] if layer is None else by_path[spec.path][layer]
        other = their_gradient[name]
        return float(np.abs((own.T if spec.transposed else own) - other).max() / np.abs(other).max())

    run = jax.jit(forward, static_argnums=0)
    positions = np.arange(96, dtype=np.int32)
    alone = run(graphdef, params, tokens, np.zeros_like(tokens), np.broadcast_to(positions, tokens.shape))
    ids, twice = np.repeat([[0, 1]], 96, axis=1).astype(np.int32), np.tile(positions, 2)[None]
    packed = run(graphdef, params, tokens.reshape(1, -1), ids, twice)
    noisy = jax.tree.map(
        lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params
    )
    export(loaded.with_params(noisy), directory, scratch)
    exported, _ = transformers_logits_and_gradient(scratch, tokens)
    return {
        "logits": float(np.abs(ours - theirs).max()),
        "gradient": max(gradient_error(name, spec, layer) for name, _, spec, layer in tensor_table(config)),
        "packed": float(np.abs(np.asarray(packed).reshape(alone.shape) - alone).max()),
        "export": float(np.abs(logits_and_gradient(graphdef, noisy, tokens)[0] - exported).max()),
    }


def loading_cost(path: str) -> dict[str, Any]:
    """Seconds and bytes of loading a model in float32 in this process, which should be a fresh one."""
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend is not what is measured
    before = peak_bytes()
    began = time.perf_counter()
    loaded = load(path)
    params, config = loaded.params, loaded.config
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    size = 4 * num_params(config)
    beyond = peak_bytes() - before - size
    return {"params": num_params(config), "seconds": seconds, "beyond": beyond, "size": size}


def peak_bytes() -> int:
    """The most that this process ever held; getrusage's figure would be the parent's, if that was more."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", default=[], help="a Hugging Face directory; repeatable")
    parser.add_argument("--loading-cost-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loading_cost_of:
        print(json.dumps(loading_cost(arguments.loading_cost_of)))
        return
    print("| family | logits | gradient, relative | packed - unpacked | export |\n|---|---|---|---|---|")
    for family, model in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            source = write_tiny_model(Path(directory) / "model", seed=1, **model)
            row = errors(source, Path(directory) / "exported")
        print(f"| {family} | " + " | ".join(f"{value:.1e}" for value in row.values()) + " |", flush=True)
    if arguments.model:
        print("\n| model | parameters | load, s | float32, MB | peak beyond it, MB |\n|---|---|---|---|---|")
    for path in arguments.model:
        command = [sys.executable, __file__, "--loading-cost-of", path]
        cost = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        name = f"{Path(path).name} ({read_config(path).num_layers} layers)"
        mb = (cost[key] / 1e6 for key in ("size", "beyond"))
        print(
            f"| {name} | {cost['params']:,} | {cost['seconds']:.1f} | "
            + " | ".join(f"{x:.0f}" for x in mb)
            + " |"
        )


if __name__ == "__main__":
    main()
