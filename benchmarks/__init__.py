"""Measurements of the program, beside its peers where there are any: `python -m benchmarks --list`."""
