"""Laws of settings: what is read is what was meant, or an error that names the setting."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from middo_jax.config import (
    GIVEN,
    RENAMED,
    RESULTLESS,
    Adafactor,
    AdamW,
    Affects,
    AnyOf,
    BadSteps,
    Config,
    ConfigError,
    Contains,
    Deviations,
    Dollars,
    Effect,
    ExpectedRating,
    Fraction,
    HostsSettings,
    SampledRating,
    Settings,
    Threshold,
    Tokens,
    WandB,
    affecting,
    default_of,
    layers_of,
    leaves,
    load,
    members_of,
    stored,
    union_of,
)
from middo_jax.config.evaluation import EvaluateSettings
from middo_jax.config.stopping import StopSettings
from middo_jax.rundir.chain import AFFECTED_BY

NEEDED = ["model.path=m", "data.path=d.jsonl"]


def test_defaults_and_overrides() -> None:
    config = load(None, [*NEEDED, "train.learning_rate=1e-4", "train.num_epochs=2", "train.num_epochs=3"])
    assert config.model.path == "m"
    assert config.train.learning_rate == 1e-4
    assert config.train.num_epochs == 3  # the last one wins
    assert config.complexity.threshold == config.diversity.threshold == config.quality.threshold
    assert config.complexity.threshold == Deviations(m=1.0)


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
        (
            "complexity.threshold={m: 1}",
            r"complexity\.threshold is not a setting\. Did you mean complexity\.m\?",
        ),
        (
            "quality.temperature=1",
            r"quality\.temperature is a setting of quality\.method=sample, and .* expected",
        ),
        (
            "quality={method: sample, score: log_odds}",
            r"quality\.score is a setting of quality\.method=expected",
        ),
        ("quality.method=guess", r"quality\.method: Input should be 'expected' or 'sample'"),
        ("train.optimizer=sgd", r"train\.optimizer\.name: Input should be 'adamw' or 'adafactor'"),
        ("train.optimizer=null", r"train\.optimizer: must be adamw or adafactor"),
        (
            "train.optimizer={name: adafactor, betas: [0.9, 0.99]}",
            r"train\.optimizer\.betas is a setting of .*adamw",
        ),
        ("train.optimizer.betas=[0.9, 1]", r"train\.optimizer\.betas: must be two numbers from 0 to below 1"),
        ("train.optimizer.wieght_decay=1", r"Did you mean train\.optimizer\.weight_decay\?"),
        ("refine.budget=3", r"refine\.budget: must be \{usd: \.\.\.\} or \{tokens: \.\.\.\}"),
        ("refine.budget={usd: 3, tokens: 4}", r"refine\.budget: give either usd or tokens, not both"),
        ("refine.budget.tokens=0", r"refine\.budget\.tokens: .*greater than 0"),
        ("refine.gates.open=[length]", r"refine\.gates\.open: length has a bar: refine\.gates\.length=null"),
        ("refine.gates.open=[polite]", r"no gate called 'polite' can be opened; these can: numbers, code"),
        ("train.on_bad_step=go on", r"train\.on_bad_step: must be stop or skip"),
        ("train.on_bad_step={skip: 1}", r"train\.on_bad_step: .*greater than 1"),
        ("train.trackers=tensorboard", r"train\.trackers: must be a list such as \[tensorboard, "),
        ("train.trackers=[{wandb: }]", r"train\.trackers: must be a list such as"),
        ("train.trackers=[tensorboard, tensorboard]", r"train\.trackers: names a tracker twice"),
        ("data.roles={narrator: usr}", r"data\.roles\.narrator: Input should be 'system', 'user'"),
        ("data.columns={instruction: q, output: q}", r"data\.columns: the column 'q' can be read as one"),
        ("noequals", r"'noequals' is not of the form a\.b=value"),
        ("=1", r"not of the form"),
        ("name=[", r"not valid YAML"),
        ("name=" + "[" * 5000, r"the value of name is not valid YAML: RecursionError"),
        ("name=2026-99-99", r"the value of name is not valid YAML: ValueError"),
    ],
)
def test_errors_name_the_setting(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(None, [*NEEDED, override])
    assert str(caught.value).startswith("config: ")


def test_a_threshold_is_one_deviation_unless_another_is_given() -> None:
    given = ["diversity.k=3", "complexity={}", "quality.fraction=0.1"]
    config = load(None, [*NEEDED, *given])
    assert config.diversity.threshold == config.complexity.threshold == Deviations(m=1.0)
    assert config.quality.threshold == Fraction(fraction=0.1)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None)
    assert "config: model.path is missing" in str(caught.value)
    assert "config: data.path is missing" in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\.path is missing; set it"):
        load(None, ["model.dtype=float32", "data.path=d"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold settings as `name: value`, not a list"),
        ("a: [", r"c\.yaml is not valid YAML"),
        ("a: " + "[" * 5000, r"c\.yaml is not valid YAML"),
        ("a: 2026-99-99", r"c\.yaml is not valid YAML"),
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


def test_every_setting_has_a_default_but_the_model_and_the_data() -> None:
    required = {leaf.name for leaf in leaves() if leaf.field.is_required() and not leaf.excludes}
    assert required == {"model.path"}
    with pytest.raises(ConfigError, match=r"data\.path is missing"):  # or data.sources
        load(None, ["model.path=m", "data.limit=1"])
    assert "train.learning_rate" in {leaf.name for leaf in leaves()}


def below(settings: type[Settings]) -> list[tuple[type[Settings], ...]]:
    """For each field: () of a setting, (group,), or the alternatives."""
    found = []
    for field in settings.model_fields.values():
        kind = field.annotation
        is_group = isinstance(kind, type) and issubclass(kind, Settings)
        found.append(members_of(field) if union_of(field) else (kind,) if is_group else ())
    return found


def groups(settings: type[Settings]) -> list[type[Settings]]:
    return [settings, *(g for members in below(settings) for member in members for g in groups(member))]


def count(settings: type[Settings]) -> int:
    """Settings that can be given at a time: of alternatives the longest counts."""
    return sum(max(map(count, members)) if members else 1 for members in below(settings))


def test_there_are_no_more_settings_than_can_be_read() -> None:
    # There were 107, and neither a job of several hosts nor benchmarks. Since 82: consistency.m,
    # refine.gates.agreement, and eight for people's own data, of which data.path and data.sources exclude
    # each other. Since 92: refine.prompts, quality.rubric and refine.wait_for_review. Since 95:
    # refine.take_back. Since 96: compilation_cache. Experiments are apart.
    apart = (HostsSettings, EvaluateSettings, StopSettings)  # and controls, seeds
    new = sum(len(group.model_fields) for group in apart)
    assert count(Config) - new - 2 - 1 <= 97
    names = [leaf.name for leaf in leaves()]
    assert len(names) == len(set(names))


def test_every_group_says_what_it_is() -> None:
    for group in groups(Config):
        assert group.__doc__, group
        assert group.model_config.get("extra") == "forbid"
        assert group.model_config.get("frozen") is True


def test_every_setting_says_what_it_affects() -> None:
    """By its own mark or by its group's, never by both, and never by a name that does not exist."""
    found = {leaf.name: leaf.mark for leaf in leaves()}
    assert [name for name, mark in found.items() if mark is None or not mark.effects] == []
    for group in groups(Config):
        own = [n for n, f in group.model_fields.items() if any(isinstance(m, Affects) for m in f.metadata)]
        assert not (group.affects and own), group
    conditional = {
        (name, effect, condition)
        for name, mark in found.items()
        for effect, condition in (mark.effects.items() if mark else ())
        if condition is not None
    }
    sampled = ("quality.method", "sample")
    of_adapters = {(f"lora.{name}", "training", ("lora.rank", GIVEN)) for name in ("alpha", "target_modules")}
    of_sampling = {("seed", "scores", sampled), ("serve.max_context", "scores", sampled)}
    of_the_embedded = {("serve.max_context", "rewrites", ("refine.base_url", None))}
    of_optional = {
        (f"consistency.{name}", "selection", ("scoring.readings", Contains("consistency")))
        for name in ("m", "fraction")
    }
    checked = ("refine.accept", AnyOf(("sane", "measured")))
    of_gates = {
        (f"refine.gates.{name}", "acceptance", condition)
        for condition, names in {
            checked: ("length", "duplicate"),
            ("refine.accept", AnyOf(("measured",))): ("agreement", "context", "novelty"),
        }.items()
        for name in names
    }
    assert conditional == of_adapters | of_sampling | of_the_embedded | of_optional | of_gates
    without, with_rank = (
        affecting(load(None, [*NEEDED, *more]), {"training"}) for more in ([], ["lora.rank=2"])
    )
    assert {"lora.alpha", "lora.target_modules"} & without.keys() == set()
    assert {"lora.alpha", "lora.target_modules"} <= with_rank.keys()
    assert {condition[0] for *_, condition in conditional} <= found.keys()
    with pytest.raises(TypeError, match="not an effect: taste"):
        Affects("speed", taste=sampled)
    with pytest.raises(TypeError, match="has a condition, and its group another one"):
        Affects(scores=sampled).only_if(sampled)


def test_every_effect_but_the_resultless_is_one_that_a_stage_depends_on() -> None:
    depended_on = frozenset[str]().union(*AFFECTED_BY.values())
    assert depended_on == set(get_args(Effect)) - RESULTLESS
    used = frozenset[str]().union(*(leaf.mark.effects for leaf in leaves() if leaf.mark))
    assert used == set(get_args(Effect))


def test_a_setting_affects_only_where_its_condition_holds() -> None:
    expected = affecting(load(None, NEEDED), {"scores"})
    sampled = affecting(load(None, [*NEEDED, "quality.method=sample"]), {"scores"})
    assert {"quality.score"} <= expected.keys() - sampled.keys()
    assert {"quality.temperature", "seed", "serve.max_context"} <= sampled.keys() - expected.keys()
    for effect in ("training", "rewrites"):  # a condition is one effect's
        assert "seed" in affecting(load(None, NEEDED), {effect})
    url = "refine.base_url=http://127.0.0.1:1/v1"
    of_url = affecting(load(None, [*NEEDED, url, "refine.model=m"]), {"rewrites"})
    assert "serve.max_context" in affecting(load(None, NEEDED), {"rewrites"}).keys() - of_url.keys()
    assert {"diversity.k", "quality.method"} <= expected.keys() & sampled.keys()
    assert not [name for name in expected if name.startswith("train.")]


@pytest.mark.parametrize(
    ("stored", "overrides", "wanted"),
    [
        ("{m: 1.5}", ["complexity.fraction=0.2"], Fraction(fraction=0.2)),
        ("{fraction: 0.2}", ["complexity.m=1.5"], Deviations(m=1.5)),
        ("{m: 1.5}", ["complexity.fraction=0.2", "complexity.m=null"], Fraction(fraction=0.2)),
        ("{m: 1.5}", ["complexity.m=null"], Deviations(m=1.0)),
        ("{m: 1.5}", ["complexity.fraction=0.2", "complexity.fraction=0.3"], Fraction(fraction=0.3)),
        ("{m: 1.5}", ["more.yaml"], Fraction(fraction=0.4)),
        ("{m: 1.5}", ["more.yaml", "complexity.m=2"], Deviations(m=2.0)),
        ("{m: 1.5}", [{"complexity": {"fraction": 0.2}}], Fraction(fraction=0.2)),
        ("{m: 1.5}", [{"complexity.fraction": 0.2}], Fraction(fraction=0.2)),
    ],
)
def test_a_fraction_takes_the_place_of_m_and_the_other_way_round(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    overrides: list[str | dict[str, Any]],
    wanted: Threshold,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(load(None, [*NEEDED, f"complexity={stored}"]).to_yaml(), encoding="utf-8")
    Path("more.yaml").write_text("complexity: {fraction: 0.4}\n", encoding="utf-8")
    assert load("c.yaml", overrides).complexity.threshold == wanted


def test_both_at_one_place_are_still_an_error(tmp_path: Path) -> None:
    for overrides in (["quality.m=1", "quality.fraction=0.1"], ["quality={m: 1, fraction: 0.1}"]):
        with pytest.raises(ConfigError, match="quality: give either m or fraction, not both"):
            load(None, [*NEEDED, *overrides])


@pytest.mark.parametrize(
    ("stored", "overrides", "name", "wanted"),
    [
        ("quality={score: log_odds}", ["quality.method=sample"], "quality.rating", SampledRating()),
        ("quality={score: log_odds}", [{"quality": {"method": "sample", "temperature": 0.5}}],
         "quality.rating", SampledRating(temperature=0.5)),
        ("quality={method: sample, temperature: 0.5}", ["more.yaml"],
         "quality.rating", ExpectedRating(score_temperature=3.0)),
        ("quality={method: sample, temperature: 0.5}", ["quality.max_new_tokens=9"],
         "quality.rating", SampledRating(max_new_tokens=9, temperature=0.5)),
        ("train.optimizer={betas: [0.8, 0.9], weight_decay: 0.1}", ["train.optimizer=adafactor"],
         "train.optimizer", Adafactor()),
        ("train.optimizer={betas: [0.8, 0.9], weight_decay: 0.1}", ["train.optimizer.name=adafactor"],
         "train.optimizer", Adafactor(weight_decay=0.1)),
        ("train.optimizer=adafactor", ["more.yaml"], "train.optimizer", AdamW(betas=(0.9, 0.95))),
        ("train.optimizer=adamw", ["train.optimizer.weight_decay=0.2"],
         "train.optimizer", AdamW(weight_decay=0.2)),
        ("refine.budget={usd: 3}", ["refine.budget.tokens=9"], "refine.budget", Tokens(tokens=9)),
        ("refine.budget={usd: 3}", [{"refine.budget": {"tokens": 9}}], "refine.budget", Tokens(tokens=9)),
        ("refine.budget={usd: 3}", ["refine.budget=null"], "refine.budget", None),
        ("refine.budget=null", ["refine.budget.usd=3"], "refine.budget", Dollars(usd=3)),
        ("train.on_bad_step={stop: 2}", ["more.yaml"],
         "train.on_bad_step", BadSteps(action="skip", spike_factor=3)),
        ("train.trackers=[tensorboard]", [{"train": {"trackers": [{"wandb": "p"}]}}],
         "train.trackers", (WandB(wandb="p"),)),
    ],
)  # fmt: skip
def test_an_alternative_takes_the_place_of_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    overrides: list[Any],
    name: str,
    wanted: object,
) -> None:
    """Over a stored config.yaml, which holds all settings of the alternative that was chosen then."""
    monkeypatch.chdir(tmp_path)
    first = load(None, [*NEEDED, stored])
    Path("c.yaml").write_text(first.to_yaml(), encoding="utf-8")
    Path("more.yaml").write_text(
        "quality: {method: expected, score_temperature: 3}\n"
        "train: {optimizer: {name: adamw, betas: [0.9, 0.95]}, on_bad_step: {skip: 3}}\n",
        encoding="utf-8",
    )
    assert load("c.yaml") == first
    for config in (load("c.yaml", overrides), load(None, [*layers_of(first), *overrides])):
        found: Any = config
        for part in name.split("."):
            found = getattr(found, part)
        assert found == wanted


def test_an_alternative_made_in_python_is_carried_whole() -> None:
    config = load(None, [*NEEDED, "quality.method=sample"])
    quality = config.quality.model_copy(update={"rating": SampledRating()})
    train = config.train.model_copy(update={"optimizer": Adafactor()})
    changed = config.model_copy(update={"quality": quality, "train": train})
    again = load(None, layers_of(changed))
    assert (again.quality.rating, again.train.optimizer) == (SampledRating(), Adafactor())


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_spelling_is_an_error_that_names_the_new_one(tmp_path: Path, name: str) -> None:
    """From YAML, the command line and Python alike."""
    group, setting = name.rsplit(".", 1)
    tree: dict[str, Any] = {setting: 1}
    for part in reversed(group.split(".")):
        tree = {part: tree}
    path = tmp_path / "old.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    wanted = f"config: {name} is now {RENAMED[name]}"
    for overrides in ([f"{name}=1"], [tree], [{name: 1}], [str(path)]):
        with pytest.raises(ConfigError) as caught:
            load(None, [*NEEDED, *overrides])
        assert str(caught.value) == wanted
    known = {leaf.name for leaf in leaves()}
    assert name not in known
    named = set(re.findall(r"\b(?:model|train|scoring|refine)\.[a-z_.]*[a-z_]", RENAMED[name]))
    assert [n for n in named if n not in known and not any(k.startswith(f"{n}.") for k in known)] == []


def test_each_setting_of_before_is_a_setting_or_has_a_new_spelling() -> None:
    """Its config.yaml held all of them; `status` and `report` read what they can of such a file."""
    old = Path(__file__).parent / "settings_before_unions.yaml"
    with pytest.raises(ConfigError) as caught:
        load(old)
    lines = str(caught.value).splitlines()
    assert {line.removeprefix("config: ").split(" is ")[0] for line in lines} == {
        *RENAMED,
        *("quality.max_new_tokens", "quality.temperature"),  # of another method than its own
    }
    assert stored(yaml.safe_load(old.read_text(encoding="utf-8"))) is None


def test_defaults_are_those_of_the_alternative_that_is_the_default() -> None:
    assert (default_of("complexity.m"), default_of("complexity.fraction")) == (1.0, None)
    assert (default_of("quality.score"), default_of("quality.temperature")) == ("expected", None)
    assert default_of("train.optimizer.betas") == [0.9, 0.999]
    assert (default_of("train.on_bad_step"), default_of("no.such")) == ({"stop": 3.0}, None)


@pytest.mark.parametrize("url", ["gs://bucket/runs", "gs:/bucket/runs", "s3://bucket"])
def test_runs_lie_in_folders_and_buckets(url: str) -> None:
    assert load(None, [*NEEDED, f"runs_dir={url}", "name=mine"]).place == f"{url}/mine"


@pytest.mark.parametrize("url", ["file:///tmp/runs", "http://host/runs", "gs://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"runs_dir: .* give a folder on this machine, gs://BUCKET/FOLDER"):
        load(None, [*NEEDED, f"runs_dir={url}"])


def test_the_cache_of_answers_is_a_file_on_this_machine() -> None:
    with pytest.raises(ConfigError, match=r"refine\.cache: .* SQLite needs a file on this machine"):
        load(None, [*NEEDED, "refine.cache=s3://bucket/llm_cache.sqlite"])
