"""A finished run's folder, written without a model: two rounds and `final`, small, seeded, consistent.

    run = write_run(tmp_path / "demo")
    run = write_run(tmp_path / "hostile", poison='<script>alert(1)</script>')

Ids, counts, thresholds and lineage agree with each other as they do in a real run.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from middo_jax.data.example import Example, Lineage, Message, Op
from middo_jax.refinement.endpoint.usage import Usage
from middo_jax.rundir import RoundDir, RunDir, read_jsonl, write_json, write_jsonl, write_text

AXES = {"complexity": ("loss_pre", "loss_post"), "diversity": ("knn_mean_sim",), "quality": ("quality",)}
OPS: dict[str, Op] = {"complexity": "simplify", "diversity": "synthesize", "quality": "rewrite"}
JUDGED = [f"{d}_{part}" for d in ("clarity", "completeness", "factuality") for part in ("prompt", "response")]
VERDICTS = (
    ("sane", "unchanged"),
    ("answer_sane", "refused"),
    (None, "request failed (500): busy"),
)
SWEEP = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
TOPICS = ("tides", "glaciers", "sourdough", "bridges", "sonnets", "compilers", "orchards", "enzymes", "chess")
TASKS = (
    ("Explain how {t} work to a curious child.", "Think of {t} as something that grows a little every day."),
    ("Write three questions about {t}, as a quiz, and give all the answers below them.",
     "1. Where are {t} found? 2. Who studies {t}? 3. Why do they matter? Answers: widely; many; they last."),
    ("Compare {t} with a surprise.", "Like a long letter, {t} reward patience and a second reading."),
)  # fmt: skip


def write_run(path: Path, n_rows: int = 240, poison: str = "", seed: int = 0) -> RunDir:
    """Writes the run's folder and returns it.

    Args:
      path: the folder; its last name is the run's.
      n_rows: rows of round 0.
      poison: a text put into every prompt, response, answer, reason, event, setting and refused row.
      seed: of all random choices.
    """
    rng, run = random.Random(seed), RunDir(path)
    settings = {
        "name": path.name,
        "rounds": 2,
        "seed": seed,
        "model": {"path": f"models/tiny-llama{poison}", "dtype": "float32"},
        "data": {"path": f"data/stories.jsonl{poison}", "eval_fraction": 0.08},
        "complexity": {"m": 1.0},
        "diversity": {"fraction": 0.1},
        "quality": {"m": 1.0},
    }
    write_text(run.config, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_jsonl(run.heldout, [_seed_example(rng, n_rows + i, poison).to_json() for i in range(20)])
    row = {"instruction": f"No answer here {poison}", "output": ""}
    write_jsonl(
        path / "rejected.jsonl",
        [{"where": f"stories.jsonl:17{poison}", "reason": f"no response {poison}", "row": row}],
    )
    examples = [_seed_example(rng, i, poison) for i in range(n_rows)]
    for index in range(2):
        run.log("round_started", round=index, note=poison)
        examples = _write_round(run.round(index), index, examples, rng, poison)
    write_jsonl(run.final.dataset, [e.to_json() for e in examples])
    _write_metrics(run.final, rng, 1.3)
    run.final.finish("train", [run.final.metrics], 63.2)
    run.final.finish("evaluate", [], 4.04)
    run.final.finish("export", [], 1.5)
    losses = {"base": 2.214, "round_00": 1.702, "round_01": 1.644, "final": 1.581}
    models = [{"name": name, "loss": loss, "n_target_tokens": 1187} for name, loss in losses.items()]
    write_json(run.heldout_losses, {"n": 20, "models": models})
    _write_heldout_rows(run, losses, seed)
    run.log(f"run_finished{poison}")
    return run


def _write_heldout_rows(run: RunDir, losses: dict[str, float], seed: int) -> None:
    """Rows of which each model's loss per token is the given one; models differ in other ways in each row."""
    rng = np.random.default_rng(seed)
    ids = [row["id"] for row in read_jsonl(run.heldout)]
    n_targets_n = np.full(len(ids), 59) + np.eye(1, len(ids), dtype=int)[0] * (1187 - 59 * len(ids))
    shared_n = rng.normal(0, 0.5, len(ids))
    table = []
    for name, loss in losses.items():
        loss_n = shared_n + rng.normal(0, 0.05, len(ids))
        loss_n += loss - (loss_n * n_targets_n).sum() / n_targets_n.sum()
        table += [
            {"model": name, "id": i, "nll": value * int(n), "n_target_tokens": int(n)}
            for i, value, n in zip(ids, loss_n.tolist(), n_targets_n, strict=True)
        ]
    pq.write_table(pa.Table.from_pylist(table), run.heldout_rows)


def _seed_example(rng: random.Random, index: int, poison: str) -> Example:
    prompt, response = rng.choice(TASKS)
    topic = f"{rng.choice(TOPICS)} (no. {index})"
    turns = (
        Message("user", prompt.format(t=topic) + poison),
        Message("assistant", response.format(t=topic) + poison),
    )
    return Example(turns)


def _write_round(
    folder: RoundDir, index: int, examples: list[Example], rng: random.Random, poison: str
) -> list[Example]:
    """Writes a round over `examples` and returns the next round's."""
    write_jsonl(folder.dataset, [e.to_json() for e in examples])
    _write_metrics(folder, rng, 1.9 - 0.3 * index)
    _write_evaluations(folder, 1.9 - 0.3 * index, poison)
    folder.finish("train", [folder.metrics], 58.4)
    table = _score(examples, rng)
    selection = _select(table)
    _write_scores(folder, table)
    folder.finish("score", [folder.scores], 21.75)
    write_json(folder.selection, selection)
    folder.finish("select", [folder.selection], 0.21)
    tasks, requests = _refine(examples, table, selection, index, rng, poison)
    write_jsonl(folder.refined, tasks)
    write_jsonl(folder.requests, requests)
    write_jsonl(folder.candidates, _candidates(tasks, table, random.Random(index), poison))
    files = [folder.refined, folder.requests, folder.candidates]
    folder.finish("refine", files, 130.0, usage=_usage(tasks))
    replaced = {
        t["replaces"]: Example.from_json(t["example"]) for t in tasks if t["accepted"] and t["replaces"]
    }
    added = [Example.from_json(t["example"]) for t in tasks if t["accepted"] and not t["replaces"]]
    write_jsonl(folder.dropped, [])
    folder.finish("merge", [folder.dropped], 0.05)
    return [replaced.get(e.id, e) for e in examples] + added


def _write_metrics(folder: RoundDir, rng: random.Random, level: float) -> None:
    steps = range(1, 61)
    losses = {s: level * (0.75 + 0.6 / s**0.5) + rng.gauss(0, 0.03) for s in steps}
    write_jsonl(
        folder.metrics,
        (
            {"step": s, "loss": losses[s], "n_target_tokens": 900, "n_tokens": 2000, "learning_rate": 2e-5,
             "grad_norm": 1.0, "seconds": 0.9}
            for s in steps
        ),
    )  # fmt: skip


def _write_evaluations(folder: RoundDir, level: float, poison: str) -> None:
    """Held-out losses that fall, of one source more than of the other."""
    write_jsonl(
        folder.evaluations,
        (
            {"step": step, "loss": level - step / 200, "n_target_tokens": 1187, "by_source": {
                f"code{poison}": {"loss": level - step / 100, "n_target_tokens": 593},
                f"chat{poison}": {"loss": level, "n_target_tokens": 594}}}
            for step in (20, 40, 60)
        ),
    )  # fmt: skip


def _score(examples: list[Example], rng: random.Random) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    ids = [e.id for e in examples]
    for i, example in enumerate(examples):
        pre = rng.lognormvariate(0.7, 0.3)
        judged = {name: min(10.0, max(0.0, rng.gauss(7.2, 1.1))) for name in JUDGED}
        similar = sorted((rng.betavariate(9, 2) for _ in range(2)), reverse=True)
        table[example.id] = {
            "loss_pre": pre,
            "loss_post": pre * rng.uniform(0.55, 0.95),
            "n_target_tokens": 20 + i % 30,
            "truncated": False,
            "knn_mean_sim": sum(similar) / 2,
            "knn_ids": [ids[(i + 1) % len(ids)], ids[(i + 2) % len(ids)]],
            "knn_sims": similar,
            **judged,
            "quality": sum(judged.values()) / len(judged),
            "error": None,
        }
    table[ids[0]] |= {"loss_post": None, "error": "loss_post is not finite"}
    return table


def _select(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    axes: dict[str, Any] = {}
    sweep: dict[str, Any] = {}
    for axis, columns in AXES.items():
        scored = {
            i: [r[c] for c in columns] for i, r in table.items() if all(r[c] is not None for c in columns)
        }
        values, sign = np.array(list(scored.values())), 1 if axis == "complexity" else -1
        mean, std = values.mean(0), values.std(0)
        fraction = 0.1 if axis == "diversity" else None
        threshold = np.quantile(values, fraction, axis=0) if fraction else mean + sign * std
        counts = {m: int((sign * (values - mean) > m * std).all(1).sum()) for m in SWEEP}
        figures = {"mean": mean, "std": std, "threshold": threshold}
        axes[axis] = {
            "n_scored": len(scored),
            "n_null": len(table) - len(scored),
            "m": None if fraction else 1.0,
            "fraction": fraction,
            **{name: dict(zip(columns, v.tolist(), strict=True)) for name, v in figures.items()},
            "ids": [i for i, v in zip(scored, values, strict=True) if (sign * (v - threshold) > 0).all()],
        }
        sweep[axis] = [{"m": m, "n": n} for m, n in counts.items()]
    hard, sparse, low = (set(axes[a]["ids"]) for a in AXES)
    overlap = {
        "hard&sparse": len(hard & sparse),
        "hard&low_quality": len(hard & low),
        "sparse&low_quality": len(sparse & low),
        "all": len(hard & sparse & low),
    }
    return {"n": len(table), "axes": axes, "overlap": overlap, "sweep": sweep}


def _write_scores(folder: RoundDir, table: dict[str, dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist([{"id": i, **row} for i, row in table.items()]), folder.scores)


def _refine(
    examples: list[Example],
    table: dict[str, dict[str, Any]],
    selection: dict[str, Any],
    index: int,
    rng: random.Random,
    poison: str,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of refined.jsonl and requests.jsonl; a sample chosen by both replacing axes is rewritten once."""
    by_id, tasks, requests = {e.id: e for e in examples}, [], []
    chosen = {a: selection["axes"][a]["ids"] for a in AXES}
    wanted = {i: [a for a in ("complexity", "quality") if i in set(chosen[a])] for i in by_id}
    plan = [(i, axes) for i, axes in wanted.items() if axes] + [
        (i, ["diversity"]) for i in chosen["diversity"]
    ]
    for number, (source_id, axes) in enumerate(plan):
        op = OPS[axes[0]]
        original, adds = by_id[source_id], op == "synthesize"
        hints = tuple(table[source_id]["knn_ids"]) if adds else ()
        lineage = Lineage(
            parent_ids=(source_id,),
            root_id=original.root_id,
            round=index,
            op=op,
            axis="+".join(axes),
            hint_ids=hints,
            refiner="tiny-refiner",
            prompt_version="1",
            scores_before={c: table[source_id][c] for a in axes for c in AXES[a]},
        )
        prompt, response = _rewritten(original, op, number, poison)
        child = original.replace_text(prompt, response, lineage)
        accepted = rng.random() > 0.25
        gate, detail = (None, None) if accepted else rng.choice(VERDICTS)
        raw = [f"<prompt>{prompt}</prompt> {poison}", "I would rather not say."]
        requests += [{"task_id": f"{op}:{source_id}", "answer": text} for text in raw]
        tasks.append({
            "task_id": f"{op}:{source_id}",
            "op": op,
            "axes": axes,
            "source_id": source_id,
            "hint_ids": list(hints),
            "accepted": accepted,
            "gate": gate,
            "detail": None if accepted else f"{detail}{poison}",
            "replaces": None if adds else source_id,
            "example": child.to_json(),
            "original": original.to_json(),
            "usage": {"requests": 2, "prompt_tokens": 410 + number, "completion_tokens": 160 + number},
        })  # fmt: skip
    return tasks, requests


def _usage(tasks: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The ledger's counters by axis, at a dollar a million tokens."""
    usage = {"probe": Usage(requests=1, answers=1, prompt_tokens=30, completion_tokens=12, seconds=0.4)}
    for task in tasks:
        tokens = task["usage"]["prompt_tokens"], task["usage"]["completion_tokens"]
        usage.setdefault("+".join(task["axes"]), Usage()).add(
            Usage(
                3, 1, 2, 0, 0, *tokens, cached_tokens=100, seconds=4.2, usd=sum(tokens) / 1e6, aside_usd=1e-3
            )
        )
    return {axis: counters.to_json() for axis, counters in usage.items()}


def _candidates(
    tasks: list[dict[str, Any]], table: dict[str, dict[str, Any]], rng: random.Random, poison: str
) -> list[dict[str, Any]]:
    """Rows of candidates.jsonl: every third task had a first attempt that some gate of its axis rejected."""
    rows = []
    for number, task in enumerate(tasks):
        scores, additional = table[task["source_id"]], task["op"] == "synthesize"
        gates = ["numbers", "context", {"complexity": "loss"}.get(task["axes"][0], "quality")]
        gates = ["duplicate", "coverage", "distribution"] if additional else gates
        last = {"accepted": task["accepted"], "gate": None if task["accepted"] else gates[number % 3]}
        for attempt, verdict in enumerate([{"accepted": False, "gate": gates[1]}, last][number % 3 > 0 :]):
            better = rng.uniform(0.02, 0.4) * (1 if verdict["accepted"] else -0.4)
            measured = {
                "loss": (scores["loss_post"] or 1.5) * (1 - better),
                "similarity": 0.9 + 0.2 * better,
                "nearest": 0.95,
                "knn_similarity": scores["knn_mean_sim"],
                "core_similarity": scores["knn_mean_sim"] + max(0.1 * better, 0) if additional else None,
                "truncated": False,
                "quality": scores["quality"] * (1 + better) if "quality" in task["axes"] else None,
            }
            early = verdict["gate"] in ("numbers", "duplicate")
            rows.append({
                "task_id": task["task_id"],
                "attempt": attempt,
                "op": task["op"],
                "axes": task["axes"],
                "source_id": task["source_id"],
                "candidate_id": task["example"]["id"],
                **verdict,
                "detail": None if verdict["accepted"] else f"so it was{poison}",
                "before": {c: scores[c] for c in ("loss_pre", "loss_post", "knn_mean_sim", "quality")},
                "measured": None if early else measured,
                "measured_under": None if early else "0123456789abcdef",
            })  # fmt: skip
    return rows


def _rewritten(original: Example, op: str, number: int, poison: str) -> tuple[str, str]:
    if op == "simplify":
        prompt = original.prompt.replace("Write three questions about", "Write one question about")
        return f"{prompt} Use short words (variant {number}).", f"In short words: {original.response}"
    if op == "rewrite":
        prompt = f"{original.prompt} Name one concrete example (variant {number})."
        return prompt, f"{original.response} For example, a harbour at dawn shows it plainly."
    topic = TOPICS[number % len(TOPICS)]
    prompt = f"Describe a day in the life of someone who depends on {topic} (variant {number})."
    return (
        prompt + poison,
        f"She rises early, thinks of {topic}, and writes down what has changed since yesterday.",
    )
