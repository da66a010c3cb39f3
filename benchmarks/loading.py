"""Seconds and host memory of loading and exporting a sharded checkpoint of 3 GB. Prints a table.

    python -m benchmarks loading

It generates random weights of the Llama-3.2-1B shape with an untied head (bfloat16, files of at most 1 GB) in
a temporary directory, then loads them in a fresh process each: on one device, and on eight simulated ones.
Memory is what the process holds at its peak (VmHWM, so Linux only) less what it held before, less the
parameters. The files are in the page cache, so that seconds are those of the program, not of a disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from middo_jax.config import MeshSettings
from middo_jax.models.config import DecoderConfig, read_config
from middo_jax.models.hf import LazyTensor, export, load, tensor_table, write_weights
from middo_jax.parallel.mesh import make_mesh

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CASES = (
    (1, (1, 1, 1), "bfloat16"),
    (1, (1, 1, 1), "float32"),
    (8, (1, 8, 1), "bfloat16"),
    (8, (1, 8, 1), "float32"),
    (8, (1, 2, 4), "bfloat16"),
)


def generate(directory: Path) -> DecoderConfig:
    """Writes config.json and random weights, a tensor at a time."""
    (directory / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    config, rng = read_config(directory), np.random.default_rng(0)

    def tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def read() -> np.ndarray:
            return (0.02 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)

        return LazyTensor(name, shape, np.dtype(ml_dtypes.bfloat16), read)

    write_weights(directory, [tensor(name, shape) for name, shape, *_ in tensor_table(config)], 1_000_000_000)
    return config


def measure(
    directory: Path, mesh_shape: Sequence[int], dtype: str, out: Path
) -> tuple[float, int, float, int]:
    """Loads, then exports: seconds and bytes beyond the parameters of each."""
    data, fsdp, tensor = mesh_shape
    mesh = make_mesh(MeshSettings(data=data, fsdp=fsdp, tensor=tensor))
    jax.jit(lambda x: x + 1)(np.zeros(8)).block_until_ready()  # what the compiler holds anyway

    before = _reset_peak()
    began = time.monotonic()
    loaded = load(directory, dtype, mesh=mesh)
    params = loaded.params
    jax.block_until_ready(params)
    load_s = time.monotonic() - began
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    load_beyond = _status("VmHWM") - before - held

    before = _reset_peak()
    began = time.monotonic()
    export(loaded, directory, out)
    export_s = time.monotonic() - began
    return load_s, load_beyond, export_s, _status("VmHWM") - before


def _reset_peak() -> int:
    """Lets the peak start anew; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Prints the table; with --measure, one case of it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs=6, metavar=("DIR", "DEVICES", "DATA", "FSDP", "TENSOR", "DTYPE"))
    arguments = parser.parse_args()
    if arguments.measure:
        directory, devices, *mesh_shape, dtype = arguments.measure
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(devices))
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(measure(Path(directory), [int(n) for n in mesh_shape], dtype, Path(out))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        config = generate(directory)
        sizes = {name: 2 * int(np.prod(shape)) for name, shape, *_ in tensor_table(config)}
        largest = max(sizes, key=lambda name: sizes[name])
        print(
            f"{sum(sizes.values()) / 1e9:.2f} GB in {len(list(directory.glob('*.safetensors')))} files, "
            f"largest tensor {largest} {sizes[largest] / 1e9:.2f} GB\n"
        )
        print("| devices | mesh | dtype | load, s | beyond the parameters, GB | export, s | beyond, GB |")
        print("|---|---|---|---|---|---|---|")
        for devices, mesh_shape, dtype in CASES:
            case = [str(directory), str(devices), *map(str, mesh_shape), dtype]
            command = [sys.executable, __file__, "--measure", *case]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            load_s, load_beyond, export_s, export_beyond = json.loads(printed)
            print(
                f"| {devices} | {', '.join(map(str, mesh_shape))} | {dtype} | {load_s:.1f} | "
                f"{load_beyond / 1e9:.2f} | {export_s:.1f} | {export_beyond / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
