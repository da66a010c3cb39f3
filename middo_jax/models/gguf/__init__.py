"""GGUF -> a Hugging Face directory: weights dequantized to float32, config, tokenizer and chat template.

    python -m middo_jax.models.gguf model.gguf OUT_DIR
    python -m middo_jax.models.gguf demo [NAME] OUT_DIR      a small real model, from its Python package

A converted model computes exactly what llama.cpp would. Otherwise the file is refused and the reason named.
"""

from middo_jax.models.gguf.convert import convert
from middo_jax.models.gguf.demos import DEMOS, demo_gguf, demo_model_path, fetch_demo

__all__ = ["DEMOS", "convert", "demo_gguf", "demo_model_path", "fetch_demo"]
