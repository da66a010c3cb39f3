"""Messages about data and models that cannot be read: counted, by file and field, in one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import FAMILIES, write_tiny_model

from middo_jax.data.formats import DataError
from middo_jax.data.sources import Rejection, commonest_reasons, read
from middo_jax.models.config import UnsupportedModel, read_config
from middo_jax.models.hf.peft import read_adapter_config
from middo_jax.models.resolve import resolve


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("tie_word_embeddings", None, "a boolean"),
        ("tie_word_embeddings", "true", "a boolean"),
        ("num_attention_heads", "4", "a whole number"),
        ("num_key_value_heads", 2.5, "a whole number"),
        ("hidden_size", None, "a whole number"),
        ("rms_norm_eps", "1e-5", "a number"),
        ("rope_theta", True, "a number"),
        ("hidden_act", 3, "text"),
        ("layer_types", "full_attention", "a list"),
        ("rope_scaling", [], "an object"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path: Path, field: str, value: Any, wanted: str) -> None:
    directory = write_tiny_model(tmp_path / "model", **FAMILIES["qwen3"])
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    for reader in (lambda: resolve(str(directory)), lambda: read_config(directory)):
        with pytest.raises(UnsupportedModel) as error:
            reader()
        assert str(error.value) == f"{file}: {field} must be {wanted}, not {json.dumps(value)}"


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_a_config_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    directory = write_tiny_model(tmp_path / "model")
    (directory / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json: (not valid JSON|must be a JSON object)"):
        resolve(str(directory))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_have_fields_of_the_right_types(tmp_path: Path, family: str) -> None:
    config = read_config(resolve(str(write_tiny_model(tmp_path / "model", **FAMILIES[family]))))
    assert config.num_layers == FAMILIES[family].get("num_hidden_layers", config.num_layers) > 0


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8, "bias": "none"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["mlp.experts"]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 2}),
        ("a_field_of_tomorrow", 0.5),
        ("rank_pattern", {"q_proj": 8}),
    ],
)
def test_a_field_of_an_adapter_that_is_unknown_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | {field: value}))
    with pytest.raises(UnsupportedModel, match=rf"adapter_config\.json: {field}=.* is not supported"):
        read_adapter_config(tmp_path)


def test_what_peft_writes_by_default_is_known(tmp_path: Path) -> None:
    from middo_jax.models.hf.files import CheckpointError

    peft = pytest.importorskip("peft")
    written = {k: v for k, v in peft.LoraConfig().to_dict().items() if k not in ADAPTER}
    extra = {"lora_dropout": 0.1, "a_field_of_tomorrow": None, "another": [], "revision": "main"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | ADAPTER | extra))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        read_adapter_config(tmp_path)


def narrated_row(n: int) -> dict[str, Any]:
    roles = ("user", "assistant", "narrator", "assistant")[n % 2 :]
    return {"messages": [{"role": role, "content": f"{role} {n}"} for role in roles]}


def test_reasons_are_counted_the_largest_first(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"messages": []}, {"messages": [{"role": "user", "content": "q"}]}, *map(narrated_row, range(5))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        read(str(path))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("none of its 7 rows can be used. The commonest reasons:")
    assert lines[1].startswith("  5 of 7: turn 3 has the unknown role 'narrator'; ")
    assert lines[1].endswith(f" ({path}:3)")
    assert len(lines) == 4


def test_reasons_that_differ_in_ids_places_and_words_are_one() -> None:
    reasons = [f"duplicate of {n:016x} (d.jsonl:{n})" for n in range(4)]
    reasons += [f"turn {n} has the unknown role 'r{n}'; known: user" for n in range(3)] + ["a", "b", "c", "c"]
    lines = commonest_reasons([Rejection(f"row {n}", reason, {}) for n, reason in enumerate(reasons)])
    assert [line.split(":")[0].strip() for line in lines] == ["4 of 11", "3 of 11", "2 of 11", "2 of 11"]
    assert lines[-1].endswith("other reasons")


def two_configs(folder: Path) -> Path:
    folder.mkdir()
    names = {"near": "North", "far": "South"}
    entries = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in names)
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    for name, sea in names.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text(
            json.dumps({"instruction": "Name it.", "output": sea}) + "\n"
        )
    return folder


def test_configs_of_a_dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("datasets")
    caplog.set_level(logging.ERROR)
    folder = two_configs(tmp_path / "ds")
    for name, sea in (("near", "North"), ("far", "South")):
        assert [e.response for e in read(f"hf:{folder}:{name}:train")[0]] == [sea]
    for path in (f"hf:{folder}:train", f"hf:{folder}:nowhere:train", str(folder)):
        with pytest.raises(
            DataError, match=r"its configs: (near, far|far, near)\. Write hf:NAME:CONFIG:SPLIT"
        ):
            read(path)
    with pytest.raises(DataError, match=r"split 'test' of config 'far'.*its splits: train"):
        read(f"hf:{folder}:far:test")


def test_the_format_of_columns_that_fit_two(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"instruction": "i", "output": "o", "messages": turns}))
    with pytest.raises(DataError, match=r"data\.format=NAME; middo convert: --from NAME"):
        read(str(path))
