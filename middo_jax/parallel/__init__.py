"""Mesh, axis rules and hosts."""
