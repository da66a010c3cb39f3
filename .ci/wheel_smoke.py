"""What an installed wheel must do without a clone; `wheel_smoke` runs it in an environment of its own."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
import time

IMPORT_S = 0.3

# The best of five: the first import writes bytecode, and a busy machine is no failure of the package.
seconds = []
for _ in range(5):
    code = "import time; t = time.perf_counter(); import middo_jax; print(time.perf_counter() - t)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds.append(float(printed))
assert min(seconds) < IMPORT_S, (
    f"import middo_jax takes {min(seconds):.2f} s, at most {IMPORT_S} s are allowed"
)
print(f"import middo_jax: {min(seconds):.3f} s")

began = time.perf_counter()
import middo_jax as middo  # noqa: E402

package = importlib.resources.files("middo_jax")
for name in ("py.typed", "configs/quickstart.yaml", "configs/quickstart_data.jsonl"):
    assert package.joinpath(name).is_file(), f"the wheel lacks {name}"
config = middo.load_config(str(package / "configs/quickstart.yaml"))
assert config.name == "quickstart"

# A table of scores that was measured elsewhere; neither a model nor JAX.
import pyarrow as pa  # noqa: E402

from middo_jax.signals.table import SCHEMA  # noqa: E402

rows = [{"id": f"row{i}", "knn_mean_sim": similarity} for i, similarity in enumerate([0.9, 0.8, 0.1, 0.85])]
chosen = middo.select(pa.Table.from_pylist(rows, SCHEMA), diversity={"fraction": 0.25})
assert chosen.ids("diversity") == ["row2"], chosen.facts
assert chosen.table["sparse"].to_pylist() == [False, False, True, False]
assert "jax" not in sys.modules

# What runs a model is imported and compiled: a pass over packed rows of a random model.
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from middo_jax.models.config import from_hugging_face  # noqa: E402
from middo_jax.models.decoder import Decoder  # noqa: E402

sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
decoder = Decoder(from_hugging_face({"model_type": "llama", **sizes, **heads}), jax.random.key(0))
tokens_bt = jnp.arange(12)[None]
hidden_btd = decoder.hidden(tokens_bt, jnp.ones_like(tokens_bt), tokens_bt)
assert hidden_btd.shape == (1, 12, 16)
assert bool(jnp.isfinite(hidden_btd).all())
print(f"select and a forward pass: {time.perf_counter() - began:.1f} s with jax {jax.__version__}")
