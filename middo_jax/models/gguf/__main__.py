"""`python -m middo_jax.models.gguf GGUF OUT_DIR`, or `demo [NAME] OUT_DIR`."""

from __future__ import annotations

import sys

from middo_jax.models.gguf import DEMOS, convert, demo_gguf
from middo_jax.models.hf import CheckpointError


def main(arguments: list[str]) -> None:
    """Converts and prints the directory, or exits with an error message."""
    try:
        match arguments:
            case ["demo", out_dir]:
                _convert_demo("smollm2", out_dir)
            case ["demo", name, out_dir]:
                _convert_demo(name, out_dir)
            case [gguf_path, out_dir]:
                print(convert(gguf_path, out_dir))
            case _:
                names = "|".join(DEMOS)
                sys.exit(f"usage: python -m middo_jax.models.gguf GGUF OUT_DIR | demo [{names}] OUT_DIR")
    except (CheckpointError, FileExistsError) as error:
        sys.exit(str(error))


def _convert_demo(name: str, out_dir: str) -> None:
    with demo_gguf(name) as gguf_path:
        print(f"{DEMOS[name].title}: {DEMOS[name].license}", file=sys.stderr)
        print(convert(gguf_path, out_dir))


if __name__ == "__main__":
    main(sys.argv[1:])
