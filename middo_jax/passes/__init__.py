"""A model over many examples, once: losses and embeddings, and ratings."""
