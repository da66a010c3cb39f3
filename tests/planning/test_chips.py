"""Topologies by their names, and which of their axes are rings."""

from __future__ import annotations

import pytest

from middo_jax.planning.chips import CHIPS, Slices, TopologyError


@pytest.mark.parametrize(
    ("text", "name", "chips", "devices", "wraps"),
    [
        ("v5e:8x8", "v5e:8x8", 64, 64, (False, False)),
        ("v5e:16x16x2", "v5e:16x16", 512, 512, (True, True)),
        ("v6e:8x16", "v6e:8x16", 128, 128, (False, True)),
        ("v5p:4x4x8", "v5p:4x4x8", 128, 128, (True, True, True)),
        ("v4:2x2x4", "v4:2x2x4", 16, 16, (False, False, False)),
        ("TPU7x:4x4x4x2", "tpu7x:4x4x4", 128, 256, (True, True, True)),
    ],
)
def test_topologies(text: str, name: str, chips: int, devices: int, wraps: tuple[bool, ...]) -> None:
    slices = Slices.parse(text)
    assert (slices.name, slices.chips, slices.devices, slices.wraps) == (name, chips, devices, wraps)


@pytest.mark.parametrize("text", ["v5e", "v5e:16", "v7e:4x4", "v5e:4x0", "v5p:4x4", "v5e:4x4x2x2"])
def test_a_wrong_topology_is_an_error_that_shows_right_ones(text: str) -> None:
    with pytest.raises(TopologyError, match=r"v5e:8x8|has \d sizes"):
        Slices.parse(text)


def test_published_rates_are_those_of_the_flops_table() -> None:
    from middo_jax.training.flops import peak_flops

    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    assert {name: peak_flops(kind) for name, kind in kinds.items()} == {
        name: chip.matmul_flops for name, chip in CHIPS.items()
    }
