"""middo-jax: closed-loop data optimisation for LLM fine-tuning, native to JAX."""

__version__ = "0.1.0"
