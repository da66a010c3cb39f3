"""Benchmarks that need no network: their rules are here, their data are the user's files."""
