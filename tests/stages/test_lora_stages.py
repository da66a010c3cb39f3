"""Laws of LoRA through the stages and commands: one base for two models, and the same model everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.command import Ended, Middo
from support.loop_fixture import fake_refiner, settings

import middo_jax.stages.passes as scoring
from middo_jax import stages
from middo_jax.config import ServeSettings, load
from middo_jax.inference.sampling import Request
from middo_jax.inference.server import load_engine
from middo_jax.loop import run_loop
from middo_jax.models import hf, loading
from middo_jax.models.checkpoint import read_metadata
from middo_jax.models.lora import partition
from middo_jax.models.model import Model, Params, Structure
from middo_jax.progress import Silent
from middo_jax.rundir import RoundDir, RunDir, RunError, read_jsonl
from middo_jax.session import Session, prepare, write_dataset
from middo_jax.stages.train import load_start

pytest_plugins = ["support.command"]

LORA = {"lora__rank": 4, "lora__alpha": 8}


class Run(NamedTuple):
    """A finished loop of one round with adapters, in `root`."""

    root: Path
    url: str
    run: RunDir

    @property
    def base(self) -> Path:
        return self.root / "model"

    @property
    def checkpoint(self) -> Path:
        return self.run.round(0).checkpoint

    def session(self, **more: Any) -> Session:
        return Session(load(None, settings(self.root, self.url, **{**LORA, **more})), Silent())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    root = tmp_path_factory.mktemp("lora")
    with fake_refiner() as (url, _), pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENAI_API_KEY", "none")
        run = run_loop(load(None, settings(root, url, **LORA, train__start_from="previous")), Silent())
        yield Run(root, url, run)


def buffers(params: Params) -> dict[tuple[str, ...], list[int]]:
    """Where each device's part of each array lies."""
    return {
        tuple(map(str, path)): [shard.data.unsafe_buffer_pointer() for shard in param[...].addressable_shards]
        for path, param in params.flat_state()
    }


def test_a_checkpoint_holds_the_adapters_and_names_their_base(adapted: Run) -> None:
    for directory in (adapted.run.round(0), adapted.run.final):
        metadata = read_metadata(directory.checkpoint)
        assert metadata is not None
        assert metadata["base"] == str(adapted.base.resolve())
        assert metadata["lora"]["rank"] == 4
        located = loading.locate(directory.checkpoint)
        assert located.weights == adapted.base.resolve()
        assert located.lora is not None
        assert located.lora.scale == 2.0
        stored = json.loads((directory.checkpoint / "params" / "_METADATA").read_text())["tree_metadata"]
        assert len(stored) == 2 * len(located.lora.target_modules)
        assert all("_lora_" in name for name in stored)
    losses = json.loads(adapted.run.heldout_losses.read_text())["models"]
    assert losses[-1]["loss"] < losses[0]["loss"] - 0.05


def test_the_previous_rounds_adapters_are_gone_on_with(adapted: Run) -> None:
    session = adapted.session()
    model, metadata = load_start(session, adapted.checkpoint)
    trained, frozen = partition(model.params, model.config)
    ours, want = (
        dict(state.flat_state()) for state in (trained, session.load_model(adapted.checkpoint).params)
    )
    assert ours
    for path, param in ours.items():
        np.testing.assert_array_equal(param[...], want[path][...])
    assert metadata["base"] == str(adapted.base.resolve())
    fresh, _ = load_start(session, session.base)
    assert not np.any(dict(fresh.params.flat_state())["layers", "q_proj_lora_b"][...])
    assert buffers(frozen).keys() == buffers(partition(fresh.params, fresh.config)[1]).keys()


def test_frozen_weights_are_stored_in_the_dtype_of_forward_passes(adapted: Run) -> None:
    model, _ = load_start(adapted.session(model__dtype="bfloat16"), adapted.checkpoint)
    trained, frozen = partition(model.params, model.config)
    assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {"float32"}


@pytest.mark.parametrize("pre", ["base", "adapters"], ids=["pre is the base", "pre has other adapters on it"])
def test_scoring_loads_one_base_for_both_models(
    adapted: Run, pre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = adapted.session()
    pre_model = adapted.base if pre == "base" else adapted.checkpoint
    post_model = adapted.checkpoint if pre == "base" else adapted.run.final.checkpoint
    kept = prepare(session)[0]

    def scores(name: str, model: Path, before: Path | None) -> dict[str, list[Any]]:
        directory = RoundDir(tmp_path / name)
        write_dataset(directory, kept)
        stages.score_stage(session, directory, model, before, ["complexity"])
        return pq.read_table(directory.scores).to_pydict()

    alone = scores("pre", pre_model, None)["loss_post"], scores("post", post_model, None)["loss_post"]
    loads: list[Path] = []
    seen: list[tuple[Structure, dict[tuple[str, ...], list[int]]]] = []
    load_weights = hf.load

    def counted(directory: Path, *arguments: Any) -> Any:
        loads.append(directory)
        return load_weights(directory, *arguments)

    class Watched(scoring.LossPass):
        def __call__(self, model: Model, *arguments: Any) -> Any:
            seen.append((model.graphdef, buffers(model.params)))
            return super().__call__(model, *arguments)

    monkeypatch.setattr(hf, "load", counted)
    monkeypatch.setattr(scoring, "LossPass", Watched)
    both = scores("both", post_model, pre_model)
    assert loads == [adapted.base.resolve()] or loads == [adapted.base]
    (_, before), (_, after) = seen
    shared = before.keys() & after.keys()
    base = {path for path in after if "lora" not in path[-1]}
    assert base <= shared
    assert all(before[path] == after[path] for path in base)
    assert (both["loss_pre"], both["loss_post"]) == alone
    assert alone[0] != alone[1]


def test_models_on_different_weights_share_none(adapted: Run, tmp_path: Path) -> None:
    other = shutil.copytree(adapted.base, tmp_path / "model")
    assert loading.locate(other).weights != loading.locate(adapted.checkpoint).weights
    link = tmp_path / "link"
    link.symlink_to(adapted.base)
    assert loading.locate(link).weights == loading.locate(adapted.checkpoint).weights


def test_other_adapters_than_the_settings_ask_for_are_refused(adapted: Run, tmp_path: Path) -> None:
    for more in ({"lora__rank": "null"}, {"lora__rank": 8}, {"lora__target_modules": "[q_proj]"}):
        with pytest.raises(RunError, match=r"holds Lora\(rank=4.*the settings ask for.*middo export"):
            load_start(adapted.session(**more), adapted.checkpoint)
    whole = shutil.copytree(adapted.checkpoint, tmp_path / "checkpoint")
    metadata = json.loads((whole / "metadata.json").read_text())
    del metadata["lora"]
    (whole / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(RunError, match=r"holds all of a model's weights, the settings ask for Lora\(rank=4"):
        load_start(adapted.session(), whole)


def test_an_engine_of_adapters_answers_as_one_of_the_merged_model(adapted: Run) -> None:
    answers = []
    for path in (adapted.run.final.checkpoint, adapted.run.final / "huggingface"):
        engine, tokenizer, eos_ids = load_engine(path, ServeSettings(max_batch=2, max_context=256))
        prompt = tokenizer("Describe the sea in one sentence.")["input_ids"]
        with engine:
            answers.append(engine.submit(Request(prompt, max_tokens=12, stop_ids=eos_ids)).result().tokens)
    assert answers[0] == answers[1] != []


def test_commands_take_an_adapter_wherever_they_take_a_model(
    adapted: Run, tmp_path: Path, middo: Middo
) -> None:
    def done(*arguments: object) -> Ended:
        ended = middo(*arguments)
        assert ended.code == 0, ended.err
        return ended

    small = ["model.max_length=512", "train.batch_size=8", "train.learning_rate=0.01"]
    data = ["--data", adapted.root / "data.json"]
    lora = ["lora.rank=2", "lora.target_modules=[q_proj, down_proj]"]
    done("train", *data, "--model", adapted.base, "--out", tmp_path / "tuned", *small, *lora)
    checkpoint, adapter = tmp_path / "tuned" / "checkpoint", tmp_path / "adapter"
    done("export", checkpoint, adapter, "--adapter")
    done("export", adapter, tmp_path / "merged", "--no-verify")
    losses = [
        done("eval", *data, "--model", model, "--json", *small).json["loss"]
        for model in (adapted.base, checkpoint, adapter, tmp_path / "merged")
    ]
    assert losses[1] == losses[2]
    assert losses[3] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1] < losses[0]
    # And a training goes on with it.
    done("train", *data, "--model", adapter, "--out", tmp_path / "more", *small, *lora)
    assert read_jsonl(tmp_path / "more" / "metrics.jsonl")[0]["loss"] < losses[0]


@pytest.mark.parity
def test_the_loops_export_opens_in_transformers_as_our_model(adapted: Run) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = adapted.run.final / "huggingface"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(directory)("Why do people like bread?")["input_ids"]
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    decoder = loading.load(loading.locate(adapted.run.final.checkpoint)).decoder()
    tokens_bt = jnp.asarray([tokens], jnp.int32)
    positions_bt = jnp.arange(len(tokens))[None]
    ours = decoder.unembed(decoder.hidden(tokens_bt, jnp.zeros_like(tokens_bt), positions_bt)[0])
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-4)
