"""Passes of a model over many examples: losses and embeddings, ratings."""
