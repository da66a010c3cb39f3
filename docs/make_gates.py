"""Writes the table of gates into docs/refine.md: `python docs/make_gates.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from middo_jax.config.gates import Gate, Switch, gate, gates

PAGE = Path(__file__).parent / "refine.md"
BEGIN = "<!-- gates: made from middo_jax/config/gates.py by `python docs/make_gates.py` -->\n"
END = "<!-- end of gates -->"


def page() -> str:
    """docs/refine.md with the table as the program has it."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


def table() -> str:
    """One row per gate, in the order of asking."""
    rows = [
        f"| {i} | `{row.name}` | {row.rule} | {_of(row)} | `{row.accept}` | {_setting(row)} |"
        for i, row in enumerate(gates(), 1)
    ]
    head = [
        "| | gate | what passes | asked of | from `refine.accept` | setting |",
        "|---:|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def _of(row: Gate) -> str:
    if row.of_own is None:
        return row.of
    return f"{row.of}; {row.of_own} if the refiner is the model in training"


def _setting(row: Gate) -> str:
    if row.setting is None:
        return ""
    switch = gate(row.setting).switch
    if isinstance(switch, Switch) and switch.has_bar:
        return f"`refine.gates.{row.setting}={switch.default}`"
    return f"`refine.gates.open=[{row.setting}]`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE, file=sys.stderr)
