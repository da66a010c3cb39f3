"""Laws of settings: what is read is what was meant, or an error that names the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from middo_jax.config import (
    RESULTLESS,
    Affects,
    Config,
    ConfigError,
    Effect,
    Settings,
    affecting,
    flat,
    load,
    marks,
    setting_names,
)
from middo_jax.rundir.chain import AFFECTED_BY

NEEDED = ["model.path=m", "data.path=d.jsonl"]


def test_defaults_and_overrides() -> None:
    config = load(None, [*NEEDED, "train.learning_rate=1e-4", "train.num_epochs=2", "train.num_epochs=3"])
    assert config.model.path == "m"
    assert config.train.learning_rate == 1e-4
    assert config.train.num_epochs == 3  # the last one wins
    assert config.complexity.m == config.diversity.m == config.quality.m == 1.0


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m, max_length: 64}\ndata: {path: d}\nrounds: 2\n")
    config = load(
        path, ["rounds=3", "mesh.tensor=2", "refine.base_url=http://127.0.0.1:1/v1", "data.limit=null"]
    )
    assert (config.rounds, config.model.max_length, config.mesh.tensor) == (3, 64, 2)
    assert config.refine.base_url == "http://127.0.0.1:1/v1"
    assert config.data.limit is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.learing_rate=1",
            r"train\.learing_rate is not a setting\. Did you mean train\.learning_rate\?",
        ),
        ("learning_rate=1", r"learning_rate is not a setting\. Did you mean train\.learning_rate\?"),
        ("trian.num_epochs=1", r"trian is not a setting\. Did you mean train\?"),
        ("qqqqqqqqq=1", r"qqqqqqqqq is not a setting\.$"),
        ("train.num_epochs.x=1", r"train\.num_epochs"),
        ("name.x=1", r"name"),
        ("train.num_epochs=0", r"train\.num_epochs: .*greater than 0"),
        ("train.num_epochs=1.5", r"train\.num_epochs: "),
        ("train.learning_rate=fast", r"train\.learning_rate: .*number"),
        ("train.learning_rate=.nan", r"train\.learning_rate: "),
        ("train.learning_rate=.inf", r"train\.learning_rate: "),
        ("complexity.m=.nan", r"complexity\.m: "),
        ("model.dtype=float64", r"model\.dtype: .*bfloat16"),
        ("name=../up", r"name: "),
        ("name=", r"name: "),
        ("refine.base_url=ftp://x", r"refine\.base_url: must start with http"),
        ("complexity.fraction=1.5", r"complexity\.fraction: .*less than 1"),
        ("complexity={m: 1, fraction: 0.5}", r"complexity: give either m or fraction, not both"),
        ("train.gradient_accumulation=3", r"gradient_accumulation must divide"),
        ("train.pack_length=1024", r"pack_length must be at least"),
        ("noequals", r"'noequals' is not of the form a\.b=value"),
        ("=1", r"not of the form"),
        ("name=[", r"not valid YAML"),
    ],
)
def test_errors_name_the_setting(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(None, [*NEEDED, override])
    assert str(caught.value).startswith("config: ")


def test_a_threshold_is_one_deviation_unless_another_is_given() -> None:
    given = ["diversity.k=3", "complexity={}", "quality.fraction=0.1"]
    config = load(None, [*NEEDED, *given])
    assert (config.diversity.m, config.complexity.m) == (1.0, 1.0)
    assert (config.quality.m, config.quality.fraction) == (None, 0.1)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None)
    assert "config: model is missing" in str(caught.value)
    assert "config: data is missing" in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\.path is missing; set it"):
        load(None, ["model.dtype=float32", "data.path=d"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold settings as `name: value`, not a list"),
        ("a: [", "not valid YAML"),
        ("", "missing"),
    ],
)
def test_files_that_are_not_settings(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)
    with pytest.raises(ConfigError, match=r"cannot read .*no\.yaml"):
        load(tmp_path / "no.yaml")


@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    path=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12),
    rate=st.floats(1e-12, 10),
    fraction=st.floats(0.001, 0.999),
    limit=st.none() | st.integers(1, 10**12),
)
@example(name="a", path="line\x85ends\u2028of\u2029Unicode", rate=1.0, fraction=0.5, limit=None)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    config = Config.model_validate(
        {
            "name": values["name"],
            "model": {"path": values["path"]},
            "data": {"path": values["path"], "limit": values["limit"]},
            "train": {"learning_rate": values["rate"]},
            "diversity": {"fraction": values["fraction"]},
        }
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load(path) == config


def test_settings_are_frozen() -> None:
    config = load(None, NEEDED)
    with pytest.raises(pydantic.ValidationError):
        config.rounds = 2


def test_every_setting_has_a_default_but_two() -> None:
    config = load(None, NEEDED)
    tree = config.model_dump()
    for name in setting_names():
        value: Any = tree
        for part in name.split("."):
            value = value[part]
    assert "train.learning_rate" in set(setting_names())


def groups(settings: type[Settings]) -> list[type[Settings]]:
    below = [f.annotation for f in settings.model_fields.values()]
    return [
        settings,
        *(g for b in below if isinstance(b, type) and issubclass(b, Settings) for g in groups(b)),
    ]


def test_every_group_says_what_it_is() -> None:
    for group in groups(Config):
        assert group.__doc__, group
        assert group.model_config.get("extra") == "forbid"
        assert group.model_config.get("frozen") is True


def test_every_setting_says_what_it_affects() -> None:
    """By its own mark or by its group's, never by both, and never by a name that does not exist."""
    found = dict(marks())
    assert found.keys() == set(setting_names())
    assert [name for name, mark in found.items() if mark is None or not mark.effects] == []
    for group in groups(Config):
        own = [n for n, f in group.model_fields.items() if any(isinstance(m, Affects) for m in f.metadata)]
        assert not (group.affects and own), group
    values = flat(load(None, NEEDED).model_dump(mode="json"))
    conditions = [mark.only_if for mark in found.values() if mark and mark.only_if]
    assert {name for name, _ in conditions} == {"quality.method"}
    assert {name for name, _ in conditions} <= values.keys()


def test_every_effect_but_the_resultless_is_one_that_a_stage_depends_on() -> None:
    depended_on = frozenset[str]().union(*AFFECTED_BY.values())
    assert depended_on == set(get_args(Effect)) - RESULTLESS
    used = frozenset[str]().union(*(mark.effects for _, mark in marks() if mark))
    assert used == set(get_args(Effect))


def test_a_setting_affects_only_where_its_condition_holds() -> None:
    expected = affecting(load(None, NEEDED), {"scores"})
    sampled = affecting(load(None, [*NEEDED, "quality.method=sample"]), {"scores"})
    assert {"quality.score"} <= expected.keys() - sampled.keys()
    assert {"quality.temperature", "quality.top_k"} <= sampled.keys() - expected.keys()
    assert {"diversity.k", "quality.method"} <= expected.keys() & sampled.keys()
    assert not [name for name in expected if name.startswith("train.")]


@pytest.mark.parametrize(
    ("stored", "overrides", "m", "fraction"),
    [
        ("{m: 1.5}", ["complexity.fraction=0.2"], None, 0.2),
        ("{fraction: 0.2}", ["complexity.m=1.5"], 1.5, None),
        ("{m: 1.5}", ["complexity.fraction=0.2", "complexity.m=null"], None, 0.2),
        ("{m: 1.5}", ["complexity.m=null"], 1.0, None),
        ("{m: 1.5}", ["complexity.fraction=0.2", "complexity.fraction=0.3"], None, 0.3),
        ("{m: 1.5}", ["more.yaml"], None, 0.4),
        ("{m: 1.5}", ["more.yaml", "complexity.m=2"], 2.0, None),
    ],
)
def test_a_fraction_takes_the_place_of_m_and_the_other_way_round(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    overrides: list[str],
    m: float | None,
    fraction: float | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(load(None, [*NEEDED, f"complexity={stored}"]).to_yaml(), encoding="utf-8")
    Path("more.yaml").write_text("complexity: {fraction: 0.4}\n", encoding="utf-8")
    complexity = load("c.yaml", overrides).complexity
    assert (complexity.m, complexity.fraction) == (m, fraction)


def test_both_at_one_place_are_still_an_error(tmp_path: Path) -> None:
    for overrides in (["quality.m=1", "quality.fraction=0.1"], ["quality={m: 1, fraction: 0.1}"]):
        with pytest.raises(ConfigError, match="quality: give either m or fraction, not both"):
            load(None, [*NEEDED, *overrides])


@pytest.mark.parametrize("url", ["gs://bucket/runs", "gs:/bucket/runs", "s3://bucket", "file:///tmp/runs"])
def test_runs_lie_on_this_machine(url: str) -> None:
    with pytest.raises(ConfigError, match=r"runs_dir: .* is a URL; buckets are not supported yet"):
        load(None, [*NEEDED, f"runs_dir={url}"])
