"""The commands: parse, call `api`, print. Results go to stdout, progress goes to stderr.

The functions import what they call, so `--help` is quick.
"""

# In the order in which `middo --help` lists the commands.
from middo_jax.cli import running, planning, steps, datasets, serving  # isort: skip
from middo_jax.cli.program import app, main

__all__ = ["app", "datasets", "main", "planning", "running", "serving", "steps"]
