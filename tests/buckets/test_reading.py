"""Datasets, models and runs that are read from a bucket."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.bucket_servers import store_of

from middo_jax.buckets import here, read_only, send
from middo_jax.buckets.store import BucketError
from middo_jax.config import load
from middo_jax.data.files import inputs_of
from middo_jax.data.sources import read_rows
from middo_jax.models.resolve import resolve
from middo_jax.rundir import RunDir

pytest_plugins = ["support.bucket_servers"]
pytestmark = pytest.mark.usefixtures("own_copies")


def rows(*texts: str) -> str:
    return "".join(json.dumps({"instruction": text, "output": text}) + "\n" for text in texts)


def test_a_dataset_is_read_and_read_anew_when_it_changes(bucket: str) -> None:
    store = store_of(bucket)
    store.put_text(rows("a", "b") + "{\n", "data/train.jsonl")
    store.put_text("a neighbour", "data/train.jsonl.md5")
    url = f"{bucket}/data/train.jsonl"
    read = read_rows(url)
    assert [example.prompt for example in read.examples] == ["a", "b"]
    assert read.rejections[0].where == f"{url}:3"  # not the copy
    copy = Path(here(url))
    before = copy.stat()
    assert (here(url), copy.stat()) == (str(copy), before)  # not copied again
    copy.write_text(rows("edited here"))
    assert len(read_rows(url).examples) == 2
    store.put_text(rows("c"), "data/train.jsonl")
    assert [example.prompt for example in read_rows(url).examples] == ["c"]
    config = load(None, ["model.path=m", f"data.path={url}"])
    assert inputs_of(config.data) == {"data": copy}


def test_patterns_and_folders(bucket: str) -> None:
    store = store_of(bucket)
    for name in ("data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl", "data/d.txt"):
        store.put_text(rows(name), name)
    assert len(read_rows(f"{bucket}/data/*.jsonl").examples) == 2
    assert len(read_rows(f"{bucket}/data/**/*.jsonl").examples) == 3
    store.remove("data/b.jsonl")
    assert len(read_rows(f"{bucket}/data/*.jsonl").examples) == 1
    assert len(read_rows(f"{bucket}/data").examples) == 1
    with pytest.raises(BucketError, match="there is no such file or folder in the bucket"):
        read_rows(f"{bucket}/none.jsonl")
    with pytest.raises(BucketError, match="there is no such file"):
        read_rows(f"{bucket}/data/*.csv")


def test_a_model_without_its_weights_and_then_with_them(bucket: str) -> None:
    store = store_of(bucket)
    store.put_text("{}", "model/config.json")
    store.put_text("weights", "model/model.safetensors")
    url = f"{bucket}/model"
    assert os.listdir(resolve(url, weights=False)) != []
    assert not (resolve(url, weights=False) / "model.safetensors").exists()
    assert (resolve(url) / "model.safetensors").read_text() == "weights"


def test_a_run_is_read_without_weights_and_gets_a_file(bucket: str) -> None:
    store = store_of(bucket)
    store.put_text("name: run\n", "run/config.yaml")
    store.put_text("weights", "run/final/checkpoint/params/d/0")
    store.put_text("{}", "run/final/checkpoint/metadata.json")
    with read_only(f"{bucket}/run") as folder:
        run = RunDir(folder)
        assert run.config.exists()
        assert not (run.final.checkpoint / "params").exists()
        run.report.write_text("<html>")
        assert send(run.report) == f"{bucket}/run/report.html"
    assert store.read("run/report.html") == "<html>"
    with pytest.raises(BucketError, match="there is no such folder in the bucket"), read_only(f"{bucket}/no"):
        pass
