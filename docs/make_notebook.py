"""Runs docs/scores.ipynb and writes what it shows into it: `python docs/make_notebook.py` (extra `docs`)."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "scores.ipynb"


def main() -> None:
    """Keeps what cells print and draw; progress on stderr, times and the kernel's own facts go."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=3600, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            for output in cell.outputs:
                # The picture alone: its text, `<Figure size ...>`, says nothing.
                if "image/png" in output.get("data", {}):
                    output.data = {"image/png": output.data["image/png"]}
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
