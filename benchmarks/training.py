"""Our training step beside a transformers and torch step on a CPU: the same examples a step. Prints tables.

    python -m benchmarks training --model models/SmolLM2-135M-Instruct --data alpaca.json

The parts are
  alpaca  steps of rows of --data, in shuffled order, as `middo train` plans them;
  full    steps of as many rows of --full tokens each, joined from those of --data.

The sides train all weights in float32 with AdamW, clipped; their steps take the same examples, in turns:
  ours           packed rows, with --remat as given;
  torch padded   micro-batches of --micro-batch examples, each padded to its longest, gradients accumulated;
  torch packed   our packed rows, position ids from which transformers makes the block-diagonal mask of its
                 scaled-dot-product attention: the packing that it offers without a GPU's kernels.

With ", huge pages" behind its name a side's memory is asked for in huge pages, by glibc's
GLIBC_TUNABLES=glibc.malloc.hugetlb=1: XLA asks for all that a step needs anew, torch reuses small pieces.

Every turn of a side is a process of its own, as its user would have it: in one process each has the others'
idle threads and freed memory to contend with. Real tokens are those of examples, without padding. Seconds are
medians over steps and turns, after one step of each turn that compiles or warms up. All sides start from the
same weights, and the losses of their first steps must agree. The limit is the time that the FLOPs of the
real tokens (training/flops.py: nothing for padding, logits of targets alone) take at the best rate that XLA
reaches in a float32 matrix product of the model's shapes.
Needs torch (the `parity` extra).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.scoring_sides import matmul_rate
from middo_jax.config import TrainSettings
from middo_jax.data.packing import PackedBatch, pack
from middo_jax.data.sources import read
from middo_jax.data.tokenize import TokenizedExample, load_tokenizer, tokenize
from middo_jax.models import hf
from middo_jax.models.model import Params
from middo_jax.parallel.mesh import make_mesh
from middo_jax.training.flops import training_flops
from middo_jax.training.optimizer import make_optimizer
from middo_jax.training.plan import PlannedStep, longest_example, plan_epoch
from middo_jax.training.step import make_train_step, put_batch

# A step of a side: its number -> loss before the update.
Step = Callable[[int], float]
HUGE = ", huge pages"
SIDES = ("ours", f"ours{HUGE}", "torch padded", f"torch padded{HUGE}", "torch packed", f"torch packed{HUGE}")
IGNORED = -100  # a label that torch's cross entropy leaves out


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=4, help="packed rows a step")
    parser.add_argument("--pack-length", type=int, default=512, help="tokens of a packed row, alpaca part")
    parser.add_argument("--full", type=int, default=1024, help="tokens of a row, full part")
    parser.add_argument("--steps", type=int, default=2, help="steps a side does before the next one's turn")
    parser.add_argument("--turns", type=int, default=5, help="of every side")
    parser.add_argument("--micro-batch", type=int, default=8, help="examples, torch padded")
    parser.add_argument("--remat", choices=["none", "dots", "layer"], default="dots")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--parts", nargs="+", default=["alpaca", "full"], choices=["alpaca", "full"])
    parser.add_argument("--out", type=Path, help="also writes everything as JSON")
    arguments = parser.parse_args()
    rate = matmul_rate(arguments.model)
    print(f"float32 matrix product: {rate / 1e9:.0f} GFLOP/s; {torch.get_num_threads()} threads of torch")
    results = {part: measure(arguments, part, rate) for part in arguments.parts}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def planned(
    arguments: argparse.Namespace, part: str
) -> tuple[TrainSettings, int, list[TokenizedExample], list[PlannedStep]]:
    """(settings, tokens of a row, examples, steps) of a part: one step to warm up, then all turns'."""
    length = arguments.pack_length if part == "alpaca" else arguments.full
    examples, _ = read(arguments.data, "auto", None)
    tokenizer = load_tokenizer(arguments.model)
    tokenized = [tokenize(e, tokenizer, length) for e in examples[:4096]]
    if part == "full":
        tokenized = joined(tokenized, length)
    settings = TrainSettings(batch_size=arguments.rows, remat=arguments.remat, learning_rate=1e-5)
    count = 1 + arguments.steps * arguments.turns
    plan = [
        PlannedStep(0, rows) for rows in plan_epoch(list(map(len, tokenized)), settings, 0, 0, length)[:count]
    ]
    if len(plan) < count:
        raise SystemExit(f"{arguments.data}: rows for {len(plan)} steps, {count} are needed")
    return settings, length, tokenized, plan


def joined(tokenized: Sequence[TokenizedExample], length: int) -> list[TokenizedExample]:
    """Rows of exactly so many tokens, cut from all examples one after the other."""
    tokens_n = np.concatenate([e.tokens_n for e in tokenized])
    is_target_n = np.concatenate([e.is_target_n for e in tokenized])
    spans = [slice(i, i + length) for i in range(0, len(tokens_n) - length + 1, length)]
    return [
        TokenizedExample(f"joined{i}", tokens_n[span], is_target_n[span], ~is_target_n[span], False)
        for i, span in enumerate(spans)
    ]


def turn_of(arguments: argparse.Namespace, part: str, side: str, turn: int) -> tuple[float, list[float]]:
    """(loss of the step that warms up, seconds of each step after it) of one turn."""
    settings, length, tokenized, plan = planned(arguments, part)
    first = 1 + turn * arguments.steps
    steps = [plan[0], *plan[first : first + arguments.steps]]
    packed = [pack(tokenized, step.rows, arguments.rows, length, max_segments=length) for step in steps]
    if side == "ours":
        step = our_step(
            arguments.model, settings, packed, longest=longest_example(list(map(len, tokenized)), length)
        )
    elif side == "torch packed":
        step = torch_step(arguments.model, settings, [[flattened(batch)] for batch in packed])
    else:
        drawn = [padded(drawn_by(step, tokenized), arguments.micro_batch) for step in steps]
        step = torch_step(arguments.model, settings, drawn)
    loss, seconds = step(0), []
    for number in range(1, len(steps)):
        began = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
    return loss, seconds


def drawn_by(step: PlannedStep, tokenized: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """A step's examples, in the order of its rows."""
    return [tokenized[i] for row in step.rows for i in row]


def measure(arguments: argparse.Namespace, part: str, rate: float) -> dict[str, object]:
    """Takes the turns of one part and prints its table."""
    _, length, tokenized, plan = planned(arguments, part)
    drawn = [drawn_by(step, tokenized) for step in plan]
    first: dict[str, float] = {}
    sides: list[str] = arguments.sides
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(arguments.turns):
        # Every turn begins with another side.
        begins = turn % len(sides)
        for name in [*sides[begins:], *sides[:begins]]:
            # Read when a process starts.
            os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1" if name.endswith(HUGE) else ""
            side = name.removesuffix(HUGE)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                first[name], of_steps = alone.submit(turn_of, arguments, part, side, turn).result()
            for number, taken in enumerate(of_steps, 1 + turn * arguments.steps):
                seconds[name].append(taken / sum(map(len, drawn[number])))  # a real token
    if max(first.values()) - min(first.values()) > 1e-3 * max(first.values()):
        raise SystemExit(f"the sides do not compute the same: losses {first}")
    config = hf.load(arguments.model).config
    measured = [e for step in drawn[1:] for e in step]
    real = sum(map(len, measured))
    flops = training_flops(
        config, [len(e) for e in measured], sum(int(e.is_target_n[1:].sum()) for e in measured)
    )
    limit = flops / real / rate
    computed = {
        "ours": len(plan[1:]) * arguments.rows * length,
        "torch padded": sum(
            m["input_ids"].numel() for d in drawn[1:] for m in padded(d, arguments.micro_batch)
        ),
        "torch packed": len(plan[1:]) * arguments.rows * length,
    }
    print(f"\n{part}: {real} real tokens in {len(plan) - 1} steps, {flops / real / 1e6:.0f} MFLOP a token")
    print(f"| side | real tokens/s | spread | {sides[0]}: faster by | computed that are real | of limit |")
    print("|---|---|---|---|---|---|")
    ours = statistics.median(seconds[sides[0]])
    rows = {}
    for name, of_side in seconds.items():
        median, side = statistics.median(of_side), name.removesuffix(HUGE)
        low, high = (1 / q for q in np.quantile(of_side, (0.75, 0.25)))
        rows[name] = {
            "tokens_per_second": 1 / median,
            "ratio": median / ours,
            "real": real / computed[side],
            "of_limit": limit / median,
        }
        print(
            f"| {name} | {1 / median:.0f} | {low:.0f} to {high:.0f} | {median / ours:.2f} | "
            f"{real / computed[side]:.0%} | {limit / median:.0%} |",
            flush=True,
        )
    return {"losses": first, "sides": rows, "mflop_a_token": flops / real / 1e6, "rate": rate}


def our_step(model: str, settings: TrainSettings, batches: Sequence[PackedBatch], longest: int) -> Step:
    """What `middo train` runs; compiles at its first step."""
    mesh = make_mesh(devices=jax.devices()[:1])
    loaded = hf.load(model, mesh=mesh, dtype="float32")
    graphdef, params = loaded.graphdef, loaded.params
    optimizer = make_optimizer(settings, len(batches))
    state = params, jax.device_put(optimizer.init(params), jax.devices()[0])
    run = make_train_step(graphdef, settings, len(batches), chunk=512, state=state, longest=longest)

    def step(number: int) -> float:
        nonlocal state
        *state, outputs = run(*state, Params({}), put_batch(batches[number], 1, mesh))
        jax.block_until_ready(state)
        return float(outputs.loss)

    return step


def torch_step(
    model: str, settings: TrainSettings, batches: Sequence[Sequence[dict[str, torch.Tensor]]]
) -> Step:
    """A plain loop: forward and backward of each micro-batch, then clip and AdamW.

    Args:
      model: a Hugging Face directory.
      settings: clipping and the learning rate.
      batches: of each step, its micro-batches: the model's arguments, and labels.
    """
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    adamw = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)

    def step(number: int) -> float:
        total = sum(int((m["labels"][:, 1:] != IGNORED).sum()) for m in batches[number])
        adamw.zero_grad(set_to_none=True)
        loss = 0.0
        for micro_batch in batches[number]:
            # transformers adds up the targets' losses and divides by the count of the whole step.
            part = network(**micro_batch, use_cache=False, num_items_in_batch=total).loss
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        adamw.step()
        return loss

    return step


def padded(examples: Sequence[TokenizedExample], size: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of examples in their order, each padded to its longest."""
    made = []
    for start in range(0, len(examples), size):
        group = examples[start : start + size]
        shape = len(group), max(map(len, group))
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for row, e in enumerate(group):
            ids[row, : len(e)] = torch.from_numpy(e.tokens_n)
            mask[row, : len(e)] = 1
            labels[row, : len(e)] = torch.from_numpy(np.where(e.is_target_n, e.tokens_n, IGNORED))
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def flattened(batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Our packed rows as transformers takes them: positions begin anew where an example does."""
    is_padding_bt = batch.segment_ids_bt < 0
    tail_bt = np.cumsum(is_padding_bt, axis=1) - 1  # the padding is a segment of its own
    positions_bt = np.where(is_padding_bt, tail_bt, batch.positions_bt)
    labels_bt = np.full(batch.tokens_bt.shape, IGNORED)
    labels_bt[:, 1:] = np.where(batch.is_target_bt[:, :-1], batch.tokens_bt[:, 1:], IGNORED)
    arrays = {"input_ids": batch.tokens_bt, "position_ids": positions_bt, "labels": labels_bt}
    return {name: torch.from_numpy(x.astype(np.int64)) for name, x in arrays.items()}


if __name__ == "__main__":
    main()
