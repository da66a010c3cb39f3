"""Checksums of parameters: computed once per arrays, and of other arrays anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from support.tiny_model import write_tiny_model

from middo_jax.models.loading import load, locate
from middo_jax.training import identity
from middo_jax.training.identity import of_model, values_of


def test_checksums_are_computed_once_per_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    checksums = identity.checksums
    monkeypatch.setattr(identity, "checksums", lambda arrays: counted.append(0) or checksums(arrays))
    model = load(locate(write_tiny_model(tmp_path / "model")))
    same = model.with_config(dataclasses.replace(model.config, attention="xla"))
    assert of_model(model) == of_model(same)
    assert len(counted) == 1
    other = model.with_params(jax.tree.map(lambda array: array + 1, model.params))
    assert values_of(other) != values_of(model)
    assert len(counted) == 2
    # One array in the place of another one.
    leaves, form = jax.tree.flatten(other.params)
    changed = jax.tree.unflatten(form, [leaves[0] + 1, *leaves[1:]])
    assert values_of(model.with_params(changed)) != values_of(other)
    assert len(counted) == 3
