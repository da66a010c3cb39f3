"""Held-out loss."""
