"""A whole fine-tuning, checked from outside: the loss falls, the export is the model, torch ends where we do.

    python -m benchmarks end_to_end --model models/SmolLM2-135M-Instruct --data alpaca.json --out end_to_end

1. ours: `train` on --rows rows, all weights or, with --rank, adapters; held-out loss every --every steps.
2. The export, opened in transformers, has the held-out loss that we computed.
3. A plain torch loop over the same steps of the same examples: each read on its own, no packing, no padding;
   torch's AdamW, transformers' model (and PEFT's adapters, which begin as ours do). Its held-out loss must be
   within 1 % of ours.

Writes OUT/curve.svg and OUT/result.json, and leaves the export in OUT/export. All in float32, on a CPU. Needs
torch (the `parity` extra; with --rank peft too).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from transformers import AutoModelForCausalLM

from middo_jax.config import AdamW, LoraSettings, TrainSettings
from middo_jax.data.sources import read
from middo_jax.data.tokenize import TokenizedExample, load_tokenizer, tokenize
from middo_jax.evaluation.heldout import row_losses, total
from middo_jax.models import hf
from middo_jax.models.lora import from_settings, merge_adapters, partition, with_fresh_adapters
from middo_jax.models.model import Model
from middo_jax.passes.losses import LossPass
from middo_jax.progress import Silent
from middo_jax.report.plots import Line, lines
from middo_jax.rundir import read_jsonl
from middo_jax.training.evaluations import Evaluation
from middo_jax.training.hooks import on_metrics
from middo_jax.training.metrics import StepMetrics
from middo_jax.training.optimizer import learning_rate_schedule
from middo_jax.training.plan import TrainingPlan, plan_training
from middo_jax.training.sft import train

CHUNK = 512
SEED = 0
# The report's page defines these classes for itself; a picture that stands alone brings its own.
STYLE = """
svg { background: #fcfcfd; font-family: system-ui, sans-serif; }
.tick, .label { font-size: 12px; fill: #667085; } .grid { stroke: #e4e7ec; } .axis { stroke: #98a2b3; }
.line { fill: none; stroke-width: 2; } .dots { fill: none; stroke-width: 5; stroke-linecap: round; }
.c-s0 { stroke: #2563eb; } .line.c-s0 { stroke-width: 7; opacity: 0.4; } .c-s1 { stroke: #d97706; }
"""


def main() -> None:
    """Trains twice and compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--heldout", type=int, default=100, help="rows behind those")
    parser.add_argument("--rank", type=int, help="adapters of this rank instead of all weights")
    parser.add_argument("--learning-rate", type=float, help="5e-5, or with --rank 5e-4")
    parser.add_argument("--batch-size", type=int, default=2, help="packed rows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, and of the longest example")
    parser.add_argument("--every", type=int, default=10, help="steps between held-out losses")
    arguments = parser.parse_args()
    rate = arguments.learning_rate or (5e-4 if arguments.rank else 5e-5)
    settings = TrainSettings(
        learning_rate=rate, batch_size=arguments.batch_size, remat="none", eval_every=arguments.every
    )
    examples, _ = read(arguments.data, "auto", arguments.rows + arguments.heldout)
    tokenizer = load_tokenizer(arguments.model)
    tokenized = [tokenize(e, tokenizer, arguments.length) for e in examples]
    trained_on, heldout = tokenized[: arguments.rows], tokenized[arguments.rows :]
    if not heldout:
        parser.error(f"--data has {len(examples)} rows; --rows leaves none of them to be held out")

    began = time.perf_counter()
    before, start = train_ours(arguments, settings, trained_on, heldout)
    seconds = {"ours": time.perf_counter() - began}
    mine = [(row["step"], row["loss"]) for row in read_jsonl(arguments.out / "run" / "evaluations.jsonl")]
    exported = torch_heldout(open_torch(arguments.out / "export"), heldout)
    began = time.perf_counter()
    theirs = list(train_torch(arguments, settings, trained_on, heldout, start))
    seconds["torch"] = time.perf_counter() - began
    result = {
        "rows": len(trained_on),
        "heldout_rows": len(heldout),
        "before": before,
        "ours": mine[-1][1],
        "export_in_transformers": exported,
        "torch": theirs[-1][1],
        "difference": abs(mine[-1][1] / theirs[-1][1] - 1),
        "seconds": seconds,
        "curve": {"ours": mine, "torch": theirs},
    }
    text = json.dumps(result, indent=2)
    (arguments.out / "result.json").write_text(text + "\n", encoding="utf-8")
    (arguments.out / "curve.svg").write_text(curve(before, mine, theirs), encoding="utf-8")
    print(text)
    for law, holds in {
        "held-out loss falls": mine[-1][1] < before,
        "transformers gives the export the same loss, to 1e-4": abs(exported / mine[-1][1] - 1) < 1e-4,
        "torch ends within 1 %": result["difference"] < 0.01,
    }.items():
        print(f"{'yes' if holds else 'NO'}: {law}")


def curve(before: float, mine: Sequence[tuple[int, float]], theirs: Sequence[tuple[int, float]]) -> str:
    """An SVG file of both sides' (step, held-out loss); torch's lies on ours where they agree."""
    series = [
        Line(name, [0, *(s for s, _ in points)], [before, *(y for _, y in points)], colour)
        for name, points, colour in (("ours", mine, "c-s0"), ("torch", theirs, "c-s1"))
    ]
    title = "Held-out loss: ours (wide, blue) and torch's (orange)"
    drawing = lines(title, series, ("step", "nats a target token"))
    opening = Markup("<svg xmlns='http://www.w3.org/2000/svg' width='460' ")
    closing = Markup(f"<style>{STYLE}</style></svg>\n")
    return drawing.replace(Markup("<svg "), opening, 1).replace(Markup("</svg>"), closing)


def train_ours(
    arguments: argparse.Namespace,
    settings: TrainSettings,
    trained_on: Sequence[TokenizedExample],
    heldout: Sequence[TokenizedExample],
) -> tuple[float, Path | None]:
    """Trains and exports; (held-out loss before, the adapters that it began with as a PEFT directory)."""
    model = hf.load(arguments.model, dtype="float32")
    start = None
    lora = from_settings(LoraSettings(rank=arguments.rank))
    if lora is not None:
        model, start = with_fresh_adapters(model, lora, SEED), arguments.out / "start"
        adapters, _ = partition(model.params, model.config)
        hf.export_adapters(adapters, model.config, arguments.model, start, "float32")
    loss_pass = LossPass(heldout, model, batch_tokens=2048, chunk=CHUNK)

    def evaluate(model: Model) -> Evaluation:
        scores, _ = loss_pass(model, Silent(), "held-out loss")
        found = total(row_losses([e.id for e in heldout], scores.loss_n, scores.n_targets_n))
        return Evaluation(found.loss, found.n_target_tokens, {})

    def show(metrics: StepMetrics) -> None:
        print(f"ours, step {metrics.step} of {metrics.total_steps}: {metrics.loss:.4f}", flush=True)

    before = evaluate(model).loss
    plan = TrainingPlan(trained_on, settings, SEED, arguments.length)
    out = arguments.out / "run"
    trained = train(model, plan, out, chunk=CHUNK, evaluate=evaluate, hooks=[on_metrics(show)])
    hf.export(merge_adapters(trained), arguments.model, arguments.out / "export", "float32")
    return before, start


def train_torch(
    arguments: argparse.Namespace,
    settings: TrainSettings,
    trained_on: Sequence[TokenizedExample],
    heldout: Sequence[TokenizedExample],
    start: Path | None,
) -> Iterator[tuple[int, float]]:
    """The same steps in a plain loop; yields (step, held-out loss)."""
    model: Any = open_torch(arguments.model)
    if start is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    learnt = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learnt, betas=AdamW().betas, weight_decay=0.0)
    plan = plan_training(list(map(len, trained_on)), settings, SEED, arguments.length)
    schedule = learning_rate_schedule(settings, len(plan))
    for number, step in enumerate(plan, 1):
        drawn = [trained_on[i] for row in step.rows for i in row]
        total = sum(int(e.is_target_n[1:].sum()) for e in drawn)
        adamw.zero_grad(set_to_none=True)
        loss = 0.0
        for e in drawn:
            part = summed_nll(model, e) / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(learnt, settings.max_grad_norm)
        for group in adamw.param_groups:
            group["lr"] = float(schedule(number - 1))
        adamw.step()
        print(f"torch, step {number} of {len(plan)}: {loss:.4f}", flush=True)
        if number % arguments.every == 0 or number == len(plan):
            yield number, torch_heldout(model, heldout)


def open_torch(directory: Path) -> Any:
    """A model of transformers, in float32, without dropout."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def summed_nll(model: Callable[..., Any], e: TokenizedExample) -> torch.Tensor:
    """Of an example's targets."""
    ids = torch.from_numpy(e.tokens_n.astype(np.int64))
    is_target = torch.from_numpy(e.is_target_n[1:])
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][is_target]
    return torch.nn.functional.cross_entropy(logits, ids[1:][is_target], reduction="sum")


@torch.no_grad()
def torch_heldout(model: Callable[..., Any], heldout: Sequence[TokenizedExample]) -> float:
    """Nats a target token."""
    n_targets = sum(int(e.is_target_n[1:].sum()) for e in heldout)
    return sum(summed_nll(model, e).item() for e in heldout) / n_targets


if __name__ == "__main__":
    main()
