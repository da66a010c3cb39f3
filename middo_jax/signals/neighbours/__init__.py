"""Exact nearest neighbours by cosine similarity, on the mesh."""
