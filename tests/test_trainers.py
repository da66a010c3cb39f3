"""What is exported, opened by the loaders of other trainers where these are installed.

    pip install trl llamafactory

They are in no extra: each needs its own versions of torch and transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_run import write_run
from support.tiny_model import write_tiny_model

from middo_jax.data.example import Example
from middo_jax.data.tokenize import load_tokenizer
from middo_jax.exporting import export_data
from middo_jax.rundir import RunDir, read_jsonl

FORMS = ("alpaca", "sharegpt", "messages", "prompt_completion")
Turns = list[tuple[str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", n_rows=20)


def turns(run: RunDir) -> list[Turns]:
    rows = (Example.from_json(row) for row in read_jsonl(run.final.dataset))
    return [[(m.role, m.content) for m in example.messages] for example in rows]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_tiny_model(tmp_path / "model")
    return load_tokenizer(tmp_path / "model", "chatml")


@pytest.mark.parametrize("form", FORMS)
def test_trl_makes_its_texts_of_the_rows(
    run: RunDir, tmp_path: Path, tokenizer: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl.data_utils", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    export_data(run, tmp_path / "out", form)
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec((tmp_path / "out" / "trl.py").read_text(), names)
    rows = names["data"]["train"]
    assert len(rows) == len(turns(run))
    for row, wanted in zip(rows, turns(run), strict=True):
        if form == "prompt_completion":  # texts, which TRL does not put into a template
            assert trl.maybe_apply_chat_template(row, tokenizer) == row
            assert [row["prompt"], row["completion"]] == [text for _, text in wanted]
            continue
        assert trl.is_conversational(row)
        said = trl.apply_chat_template(row, tokenizer)
        text = said["text"] if "text" in said else said["prompt"] + said["completion"]
        expected = [{"role": role, "content": content} for role, content in wanted]
        assert text == tokenizer.apply_chat_template(expected, tokenize=False)


def test_trl_makes_its_texts_of_the_pairs(run: RunDir, tmp_path: Path, tokenizer: Any) -> None:
    trl = pytest.importorskip("trl.data_utils", reason="trl is not installed")
    assert export_data(run, tmp_path / "out", pairs=True).n_pairs > 0
    for row in read_jsonl(tmp_path / "out" / "pairs.jsonl"):
        said = trl.maybe_apply_chat_template(row, tokenizer)
        assert said.keys() == {"prompt", "chosen", "rejected"}
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            assert said["prompt"] + said[side] == whole


@pytest.mark.parametrize("form", FORMS)
def test_llama_factory_loads_the_rows_by_dataset_info(
    run: RunDir, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")  # it asks for older versions than ours
    loader = pytest.importorskip("llamafactory.data.loader", reason="llamafactory cannot be imported")
    hparams = pytest.importorskip("llamafactory.hparams", reason="llamafactory cannot be imported")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "out"
    export_data(run, out, form, heldout=True)
    assert json.loads((out / "dataset_info.json").read_text()).keys() == {"demo", "demo_heldout"}
    data = hparams.DataArguments(dataset_dir=str(out), overwrite_cache=True)
    model = hparams.ModelArguments(model_name_or_path="-", cache_dir=str(tmp_path / "cache"))
    training = transformers.Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    found, _ = (
        loader._load_single_dataset(each, model, data, training)
        for each in loader.get_dataset_list(["demo", "demo_heldout"], str(out))
    )
    loaded = [[(t["role"], t["content"]) for t in (*row["_prompt"], *row["_response"])] for row in found]
    assert loaded == turns(run)
