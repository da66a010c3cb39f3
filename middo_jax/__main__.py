"""`python -m middo_jax` is `middo`."""

from middo_jax.cli import main

main()
