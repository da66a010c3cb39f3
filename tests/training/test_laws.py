"""Laws of training at large: what torch computes, what any mesh and any number of processes compute."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support import tiny_training
from support.processes import run_together
from support.tiny_model import FAMILIES, VOCAB_SIZE, write_tiny_model
from support.tiny_training import CHUNK, PACK_LENGTH, SETTINGS, Killed, examples, fine_tune, kill_at, mesh_of

from middo_jax.config import AdamW
from middo_jax.data.packing import pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.models import hf
from middo_jax.models.config import DecoderConfig
from middo_jax.models.model import Params
from middo_jax.parallel.preemption import EXIT_PREEMPTED
from middo_jax.rundir import read_jsonl
from middo_jax.training.feed import feed
from middo_jax.training.optimizer import make_optimizer
from middo_jax.training.plan import plan_training
from middo_jax.training.step import batch_gradient, make_train_step, put_batch

ONE = mesh_of(1, 1, 1)


def assert_close(got: Params, want: Params, relative: float) -> None:
    """Largest difference of each parameter, relative to its largest entry."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = float(np.abs(jax.device_get(a) - jax.device_get(b)).max())
        assert error <= relative * float(np.abs(b).max()), jax.tree_util.keystr(path)


def assert_same_metrics(directory: Path, other: Path, relative: float) -> None:
    """Step by step; the order of the data shows in the number of targets, which no rounding reaches."""
    mine, theirs = (read_jsonl(path / "metrics.jsonl") for path in (directory, other))
    assert [(r["step"], r["n_target_tokens"]) for r in mine] == [
        (r["step"], r["n_target_tokens"]) for r in theirs
    ]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [r[name] for r in mine] == pytest.approx([r[name] for r in theirs], rel=relative), name


def by_name(params: Params, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Arrays of the parameters' structure, by Hugging Face name and in its layout."""
    arrays = {path: np.asarray(value[...]) for path, value in params.flat_state()}
    found = {}
    for name, _, spec, layer in hf.tensor_table(config):
        array = arrays[spec.path] if layer is None else arrays[spec.path][layer]
        found[name] = array.T if spec.transposed else array
    return found


def torch_loss(model: Any, tokenized: list[TokenizedExample]) -> Any:
    """Mean over the targets of all examples, each read on its own, without padding."""
    import torch

    nll, n_targets = torch.tensor(0.0), 0
    for example in tokenized:
        ids = torch.from_numpy(example.tokens_n.astype(np.int64))
        is_target = torch.from_numpy(example.is_target_n[1:])
        logits = model(ids[None]).logits[0, :-1][is_target]
        nll = nll + torch.nn.functional.cross_entropy(logits, ids[1:][is_target], reduction="sum")
        n_targets += int(is_target.sum())
    return nll / n_targets


def torch_model(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    eager = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(directory, **eager).eval()


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3"])
def test_a_packed_batch_has_the_loss_and_gradient_of_torch_unpacked(family: str, tmp_path: Path):
    pytest.importorskip("torch")
    directory = write_tiny_model(tmp_path, seed=7, **FAMILIES[family])
    loaded = hf.load(directory)
    graphdef, params, config = loaded.graphdef, loaded.params, loaded.config
    # Two micro-batches of two rows; the last holds a third of the others' targets.
    rows, tokenized = [[0, 3, 4], [1, 5], [2], [6]], examples(7, VOCAB_SIZE)
    batch = put_batch(pack(tokenized, rows, 4, 48, max_segments=4), 2, ONE)
    step = jax.jit(batch_gradient, static_argnums=(0, 4, 5))
    loss, n_targets, gradient = step(graphdef, params, Params({}), batch, CHUNK, "layer")

    model = torch_model(directory)
    wanted = torch_loss(model, tokenized)
    wanted.backward()
    assert int(n_targets) == sum(int(e.is_target_n[1:].sum()) for e in tokenized)
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-4)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for name, ours in by_name(gradient, config).items():
        scale = np.abs(theirs[name]).max()
        np.testing.assert_allclose(ours, theirs[name], rtol=0, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parity
def test_steps_are_those_of_torch_adamw(tmp_path: Path):
    """Clipping, decay of matrices alone, schedule and moments: the losses of the steps tell them all."""
    torch = pytest.importorskip("torch")
    directory = write_tiny_model(tmp_path, seed=7, **FAMILIES["llama3"])
    loaded = hf.load(directory, mesh=ONE)
    graphdef, params = loaded.graphdef, loaded.params
    tokenized = examples(40, VOCAB_SIZE)
    plan = plan_training(list(map(len, tokenized)), SETTINGS, 0, PACK_LENGTH)[:8]
    optimizer = make_optimizer(SETTINGS, len(plan))
    state = params, jax.device_put(optimizer.init(params), jax.devices()[0])
    step = make_train_step(graphdef, SETTINGS, len(plan), chunk=CHUNK, state=state)
    losses, rates = [], []
    for batch, _ in feed(tokenized, plan, SETTINGS, PACK_LENGTH, ONE):
        *state, outputs = step(*state, Params({}), batch)
        losses.append(float(outputs.loss))
        rates.append(float(outputs.learning_rate))

    model = torch_model(directory)
    matrices = [p for name, p in model.named_parameters() if "_proj" in name or "lm_head" in name]
    others = [p for name, p in model.named_parameters() if "_proj" not in name and "lm_head" not in name]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=AdamW().betas, weight_decay=SETTINGS.optimizer.weight_decay)
    theirs = []
    for planned, rate in zip(plan, rates, strict=True):
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.zero_grad()
        loss = torch_loss(model, [tokenized[i] for row in planned.rows for i in row])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        adamw.step()
        theirs.append(loss.item())
    assert losses == pytest.approx(theirs, rel=1e-4)
    assert max(abs(a - b) for a, b in itertools.pairwise(losses)) > 1e-2  # steps that show


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Path]:
    """(parameters, folder) of 20 steps and more on one device."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    params = jax.device_get(fine_tune(directory, examples(40), ONE))
    assert len(read_jsonl(directory / "metrics.jsonl")) >= 20
    return params, directory


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2)])
def test_twenty_steps_on_any_mesh_are_those_of_one_device(
    shape: tuple[int, int, int], uninterrupted: tuple[Params, Path], tmp_path: Path
):
    params = fine_tune(tmp_path, examples(40), mesh_of(*shape))
    assert_same_metrics(tmp_path, uninterrupted[1], 1e-4)
    assert_close(params, uninterrupted[0], 1e-3)


@pytest.mark.parametrize("stop", [2, 11, 20])
def test_killed_on_one_mesh_and_resumed_on_another(
    stop: int, uninterrupted: tuple[Params, Path], tmp_path: Path
):
    first, second = (mesh_of(1, 4, 2), mesh_of(8, 1, 1)) if stop % 2 else (mesh_of(2, 4, 1), ONE)
    with pytest.raises(Killed):
        fine_tune(tmp_path, examples(40), first, on_step=kill_at(stop))
    params = fine_tune(tmp_path, examples(40), second)
    assert_same_metrics(tmp_path, uninterrupted[1], 1e-4)
    assert_close(params, uninterrupted[0], 1e-3)


def two_processes(tmp_path: Path, directory: Path, stop: str = "0", code: int = 0) -> list[Path]:
    """Runs them to their end, or until they stop at a step with this exit code; what each ended up with."""
    outs = [tmp_path / f"{process}.npz" for process in range(2)]
    run_together(2, lambda process: [tiny_training.__file__, outs[process], directory, stop], code)
    return outs


@pytest.mark.multiprocess
def test_two_processes_train_like_one(uninterrupted: tuple[Params, Path], tmp_path: Path):
    wanted, directory = uninterrupted
    for out in two_processes(tmp_path, tmp_path / "two"):
        params = jax.tree.unflatten(jax.tree.structure(wanted), np.load(out).values())
        assert_close(params, wanted, 1e-3)
    assert_same_metrics(tmp_path / "two", directory, 1e-4)


@pytest.mark.multiprocess
def test_killed_on_two_processes_and_resumed_on_one(uninterrupted: tuple[Params, Path], tmp_path: Path):
    two_processes(tmp_path, tmp_path / "cut", "kill:11")
    assert not (tmp_path / "cut" / "checkpoint" / "metadata.json").exists()
    seen: list[int] = []
    params = fine_tune(tmp_path / "cut", examples(40), ONE, on_step=lambda m: seen.append(m.step))
    assert seen[0] == 9
    assert_same_metrics(tmp_path / "cut", uninterrupted[1], 1e-4)
    assert_close(params, uninterrupted[0], 1e-3)


@pytest.mark.multiprocess
def test_a_sigterm_to_one_of_two_processes_stops_both_at_one_step(
    uninterrupted: tuple[Params, Path], tmp_path: Path
):
    two_processes(tmp_path, tmp_path / "cut", "term:5", EXIT_PREEMPTED)
    stopped = len(read_jsonl(tmp_path / "cut" / "metrics.jsonl"))
    seen: list[int] = []
    params = fine_tune(tmp_path / "cut", examples(40), ONE, on_step=lambda m: seen.append(m.step))
    assert 5 <= stopped < 20
    assert seen[0] == stopped + 1  # nothing that was computed is lost
    assert_same_metrics(tmp_path / "cut", uninterrupted[1], 1e-4)
    assert_close(params, uninterrupted[0], 1e-3)
