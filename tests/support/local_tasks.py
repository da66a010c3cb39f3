"""Tasks of lm-eval's form over rows on this machine: multiple choice, generation, whole texts.

folder = write_local_tasks(tmp_path)
settings = {"evaluate.tasks": list(LOCAL_TASKS), "evaluate.include_path": str(folder)}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

LOCAL_TASKS = ("capitals", "sums", "texts")
_CAPITALS = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Greece": "Athens", "Egypt": "Cairo"}


def write_local_tasks(folder: Path) -> Path:
    """Writes three tasks of five rows each, and their rows; returns the folder."""
    names = list(_CAPITALS.values())
    rows: dict[str, list[dict[str, Any]]] = {
        "capitals": [
            {"question": f"What is the capital of {country}?", "choices": names, "answer": i}
            for i, country in enumerate(_CAPITALS)
        ],
        "sums": [{"question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(5)],
        "texts": [{"text": f"The capital of {a} is {b}, as people know."} for a, b in _CAPITALS.items()],
    }

    def mean(metric: str) -> dict[str, Any]:
        return {"metric": metric, "aggregation": "mean", "higher_is_better": True}

    bits = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    forms: dict[str, dict[str, Any]] = {
        "capitals": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [mean("acc")],
        },
        "sums": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}} A:",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "What"], "do_sample": False, "max_gen_toks": 12},
            "metric_list": [mean("exact_match")],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [bits],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, form in forms.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        config = {"task": name, **source, "test_split": "test", **form}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder
