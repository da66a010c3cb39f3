"""Settings that are auto get the value that a run can use: what fits, and no less than that."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from middo_jax.config import Config, ConfigError, load
from middo_jax.models.config import DecoderConfig
from middo_jax.parallel.mesh import one_device
from middo_jax.planning import automatic
from middo_jax.planning.automatic import Placement, changed_settings, settled
from middo_jax.planning.compiling import Memory, memory_of_program
from middo_jax.planning.programs import Program, training

TINY = DecoderConfig(512, 128, 256, 2, 4, 2, 32, 256, attention="xla", dtype="float32")


def settings(**more: object) -> Config:
    named = {"model.path": "none", "data.path": "none", "model.max_length": 128, "train.batch_size": 64}
    return load(None, [{**named, **more}])


def chosen(config: Config, usable: float | None) -> list[str]:
    return changed_settings(config, settled(config, lambda: TINY, Placement(one_device(), usable)))


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Program], float]], list[str]]:
    """Replaces the compiler by a function of the program; returns the names of what was compiled."""

    def replace(used: Callable[[Program], float]) -> list[str]:
        names: list[str] = []

        def measured(program: Program, mesh: object, usable: float) -> Memory:
            names.append(program.name)
            return Memory(used(program), usable, {})

        monkeypatch.setattr(automatic, "memory_of_program", measured)
        return names

    return replace


def test_a_cpu_gets_what_suits_it_without_compiling(needs: Callable[..., list[str]]) -> None:
    compiled = needs(lambda program: 0.0)
    config = settings(**{"train.remat": "auto", "train.gradient_accumulation": "auto", "mesh.tensor": "auto"})
    expected = ["mesh.tensor=1", "train.gradient_accumulation=1", "train.remat=layer"]
    assert chosen(config, None) == [*expected, "scoring.batch_tokens=2048"]
    assert compiled == []


def positions(program: Program) -> int:
    """Of a pass, from its name such as "16 rows of 1024, texts up to 1024"."""
    rows, _, rest = program.name.partition(" rows of ")
    return int(rows) * int(rest.split(",")[0])


def test_a_scoring_batch_is_halved_until_it_fits(needs: Callable[..., list[str]]) -> None:
    compiled = needs(positions)
    room = automatic.bytes_beside(settings(), TINY, one_device())
    assert chosen(settings(), (16_384 + room) / automatic.SHARE + 1) == ["scoring.batch_tokens=16384"]
    assert chosen(settings(), (16_383 + room) / automatic.SHARE) == ["scoring.batch_tokens=8192"]
    assert any("prefix" in name for name in compiled)  # the ratings share the setting


def test_room_for_a_training_that_evaluates(needs: Callable[..., list[str]]) -> None:
    needs(positions)
    config = settings(**{"train.eval_every": 5})
    alone, beside = (automatic.bytes_beside(each, TINY, one_device()) for each in (settings(), config))
    assert beside > 2 * alone  # float32 parameters and two moments
    assert chosen(config, (16_384 + alone) / automatic.SHARE + 1) != ["scoring.batch_tokens=16384"]


def test_training_recomputes_only_what_does_not_fit(needs: Callable[..., list[str]]) -> None:
    """A row of 1,024 needs 8 units without recomputation, 4 with dots and 1 with layer."""
    auto = {"train.remat": "auto", "train.gradient_accumulation": "auto", "scoring.batch_tokens": 1024}
    config, unit = settings(**auto, **{"model.max_length": 1024}), 1e9
    per_row = {"none": 8, "dots": 4, "layer": 1}
    state = 0.0

    def used(program: Program) -> float:
        nonlocal state
        found = re.fullmatch(r"\d+ x (\d+) rows of 1024, remat (\w+)", program.name)
        assert found is not None
        rows, remat = found.groups()
        state = sum(program.parts.values())
        return state + unit * per_row[remat] * int(rows)

    compiled = needs(used)
    chosen(config, 1e15)
    compiled.clear()

    def found(units: float) -> list[str]:
        return chosen(config, (units * unit + state) / automatic.SHARE + 1)

    assert found(8 * 64) == ["train.gradient_accumulation=1", "train.remat=none"]
    # Four rows are 4,096 tokens; before micro-batches become smaller, more is recomputed.
    assert found(8 * 4) == ["train.gradient_accumulation=16", "train.remat=none"]
    assert found(8 * 4 - 1) == ["train.gradient_accumulation=16", "train.remat=dots"]
    assert found(4 * 4 - 1) == ["train.gradient_accumulation=8", "train.remat=layer"]
    assert found(1) == ["train.gradient_accumulation=64", "train.remat=layer"]
    assert len(compiled) < 20


def test_nothing_that_fits_is_an_error(needs: Callable[..., list[str]]) -> None:
    needs(lambda program: 1e15)
    with pytest.raises(ConfigError, match=r"training does not fit the .* GiB of a device with any"):
        chosen(settings(**{"train.remat": "auto"}), 1e9)


def test_the_real_compiler_is_asked() -> None:
    """A training step whose eight rows do not fit is split; its memory is that of this CPU's compiler."""
    mesh, narrow = one_device(), dataclasses.replace(TINY, num_layers=1)
    config = settings(**{"train.batch_size": 8, "train.gradient_accumulation": "auto"})
    whole = automatic.with_changes(config, ["train.gradient_accumulation=1"])
    used = memory_of_program(training(whole, narrow, mesh, 0.55, 1.0), mesh, 1e12).used
    place = Placement(mesh, 0.99 * used / automatic.SHARE)
    found = automatic.micro_batches_and_remat(config, narrow, place)
    assert found in (
        ("train.remat=layer", "train.gradient_accumulation=2"),
        ("train.remat=layer", "train.gradient_accumulation=4"),
    )
