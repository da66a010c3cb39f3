"""Laws of checkpoints: what was saved comes back on any mesh; nothing half-written is taken for whole."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from support.forward import forward

from middo_jax.config import ConfigError, MeshSettings, TrainSettings
from middo_jax.models.checkpoint import read_metadata, restore_params, save_params
from middo_jax.models.config import DecoderConfig
from middo_jax.models.decoder import Decoder, split
from middo_jax.models.model import Params, abstract_model, by_path, structure, with_values
from middo_jax.models.parameters import parameters
from middo_jax.parallel.mesh import make_mesh
from middo_jax.rundir import RunError
from middo_jax.training.checkpoint import TrainingCheckpoints, TrainState
from middo_jax.training.optimizer import abstract_opt_state, make_optimizer

CONFIG = DecoderConfig(96, 32, 64, 2, 4, 2, 8, 64)
# Where one array cannot be read, Orbax abandons the reads of the others, which Python notes
# when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OPTIMIZER = make_optimizer(TrainSettings(), 10)


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    settings = MeshSettings(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(settings, jax.devices()[: data * fsdp * tensor])


def params_on(mesh: Mesh, seed: int = 0) -> Params:
    _, params = split(Decoder(CONFIG, jax.random.key(seed)))
    return jax.tree.map(
        lambda x, to: jax.device_put(x, to.sharding), params, abstract_model(CONFIG, mesh).params
    )


def state_at(step: int, mesh: Mesh) -> TrainState:
    params = params_on(mesh, seed=step)
    return TrainState(step, params, jax.jit(OPTIMIZER.init)(params))


def targets(mesh: Mesh):
    params = abstract_model(CONFIG, mesh).params
    return params, abstract_opt_state(OPTIMIZER, params, mesh)


def assert_identical(got: Params, want: Params) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))


def truncate_largest_file(directory: Path) -> None:
    largest = max((p for p in directory.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1), (8, 1, 1)])
def test_parameters_come_back_on_another_mesh(shape: tuple[int, int, int], tmp_path: Path):
    saved = params_on(mesh_of(1, 8, 1))
    save_params(tmp_path, saved, {"base": "models/tiny", "step": 7})
    assert read_metadata(tmp_path) == {"base": "models/tiny", "step": 7}
    mesh = mesh_of(*shape)
    restored = restore_params(tmp_path, CONFIG, mesh)
    assert_identical(restored, saved)
    placed = dict(nnx.to_flat_state(restored))
    for spec in parameters(CONFIG):
        assert placed[spec.path][...].sharding.is_equivalent_to(spec.sharding(mesh), len(spec.axes))
    tokens = jnp.arange(8)[None]
    hidden = forward(structure(CONFIG), restored, tokens, jnp.zeros((1, 8), jnp.int32), tokens)
    assert hidden.shape == (1, 8, 32)


def test_dtype_is_kept_or_cast(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    saved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_on(mesh))
    save_params(tmp_path, saved, {})
    kept = restore_params(tmp_path, CONFIG, mesh)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}
    assert_identical(kept, saved)
    cast = restore_params(tmp_path, CONFIG, mesh, "float32")
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype(jnp.float32)}
    assert_identical(cast, jax.tree.map(lambda x: x.astype(jnp.float32), saved))


def test_a_later_save_replaces_an_earlier_one(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    save_params(tmp_path, params_on(mesh, seed=0), {"step": 1})
    save_params(tmp_path, params_on(mesh, seed=1), {"step": 2})
    assert_identical(restore_params(tmp_path, CONFIG, mesh), params_on(mesh, seed=1))
    assert read_metadata(tmp_path) == {"step": 2}


def test_what_cannot_be_restored_is_an_error_with_its_place(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    with pytest.raises(RunError, match="holds no finished checkpoint"):
        restore_params(tmp_path, CONFIG, mesh)
    save_params(tmp_path, params_on(mesh), {})
    with pytest.raises(RunError, match="of another model"):
        restore_params(tmp_path, DecoderConfig(96, 16, 64, 2, 4, 2, 8, 64), mesh)
    with pytest.raises(ConfigError, match=r"mesh\.tensor=8 does not divide parameter layers\.k_proj"):
        restore_params(tmp_path, DecoderConfig(96, 32, 64, 2, 4, 1, 4, 64), mesh_of(1, 1, 8))
    truncate_largest_file(tmp_path / "params")
    with pytest.raises(RunError, match="damaged"):
        restore_params(tmp_path, CONFIG, mesh)
    gc.collect()
    # Killed between the parameters and what says that they are whole.
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(RunError, match="holds no finished checkpoint"):
        restore_params(tmp_path, CONFIG, mesh)


def test_a_checkpoint_that_is_not_finite_names_the_parameter(tmp_path: Path):
    mesh = mesh_of(1, 8, 1)
    params = params_on(mesh)
    path = next(path for path in by_path(params) if "up_proj" in path)
    broken = by_path(params)[path].at[..., -1].set(jnp.nan)
    save_params(tmp_path, with_values(params, {**by_path(params), path: broken}), {})
    name = re.escape(".".join(map(str, path)))
    with pytest.raises(RunError, match=rf"{re.escape(str(tmp_path))}: tensor {name} holds NaN"):
        restore_params(tmp_path, CONFIG, mesh)


def test_the_newest_training_state_comes_back_on_another_mesh(tmp_path: Path):
    with TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints:
        assert checkpoints.restore(*targets(mesh_of(1, 8, 1))) is None
        for step in (2, 4):
            checkpoints.save(state_at(step, mesh_of(1, 8, 1)))
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["4"]
    with TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints:
        restored = checkpoints.restore(*targets(mesh_of(2, 2, 2)))
    assert restored is not None
    assert restored.step == 4
    want = state_at(4, mesh_of(2, 2, 2))
    assert jax.tree.structure(restored) == jax.tree.structure(want)
    assert_identical(restored.trained, want.trained)
    assert (
        jax.tree.leaves(restored.trained)[0].sharding
        == jax.tree.leaves(targets(mesh_of(2, 2, 2))[0])[0].sharding
    )


def test_a_save_under_way_is_not_touched_by_the_next_step(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    state = state_at(1, mesh)
    want = jax.device_get(state.trained)
    want = jax.tree.map(np.array, want)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    with TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints:
        checkpoints.save(state)
        params = overwrite(state.trained)
        for _ in range(10):
            params = overwrite(params)
    with TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints:
        restored = checkpoints.restore(*targets(mesh))
    assert restored is not None
    assert_identical(restored.trained, want)


def test_of_another_training_is_refused(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    with TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints:
        checkpoints.save(state_at(1, mesh))
    with (
        TrainingCheckpoints(tmp_path, "b", asynchronous=True) as checkpoints,
        pytest.raises(RunError, match="another training"),
    ):
        checkpoints.restore(*targets(mesh))
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["1"]


def test_a_damaged_state_is_set_aside_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    mesh = mesh_of(1, 1, 1)
    with TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints:
        checkpoints.save(state_at(3, mesh))
    truncate_largest_file(tmp_path / "steps" / "3")
    with (
        caplog.at_level(logging.WARNING),
        TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints,
    ):
        assert checkpoints.restore(*targets(mesh)) is None
        assert "steps/3 cannot be read" in caplog.text
        # The training that starts anew may save the same step again, and clears up when it is done.
        checkpoints.save(state_at(3, mesh))
        restored = checkpoints.restore(*targets(mesh))
        assert restored is not None
        assert_identical(restored.trained, state_at(3, mesh).trained)
        checkpoints.finish(restored, {"base": "here"})
    gc.collect()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metadata.json", "params"]
    from_here = os.path.relpath("here", tmp_path)
    expected = {"base": "here", "base_from_here": from_here, "step": 3, "identity": "a"}
    assert read_metadata(tmp_path) == expected


def test_a_state_with_a_flipped_bit_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Orbax itself reads it without a word."""
    mesh = mesh_of(1, 1, 1)
    with TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints:
        checkpoints.save(state_at(3, mesh))
    largest = max((tmp_path / "steps" / "3" / "trained").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    largest.write_bytes(bytes(data))
    with (
        caplog.at_level(logging.WARNING),
        TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints,
    ):
        assert checkpoints.restore(*targets(mesh)) is None
    assert "its values are not those that were saved" in caplog.text


def test_a_training_is_continued_only_with_the_lines_that_it_has_written(tmp_path: Path):
    mesh, log = mesh_of(1, 1, 1), tmp_path / "metrics.jsonl"

    def restored() -> TrainState | None:
        with TrainingCheckpoints(tmp_path / "c", "a", asynchronous=True, logs=[log]) as checkpoints:
            return checkpoints.restore(*targets(mesh))

    log.write_text("1\n2\n", encoding="utf-8")
    with TrainingCheckpoints(tmp_path / "c", "a", asynchronous=True, logs=[log]) as checkpoints:
        checkpoints.save(state_at(2, mesh))
    log.write_text("1\n2\n3\n", encoding="utf-8")  # of a step that is not saved
    assert restored() is not None
    for text in ("1\n7\n3\n", "1\n", ""):
        log.write_text(text, encoding="utf-8")
        with pytest.raises(RunError, match=r"metrics\.jsonl was edited or lost since step 2 .*put it back"):
            restored()
    log.unlink()
    with pytest.raises(RunError, match=r"edited or lost"):
        restored()


def test_killed_while_saving_leaves_the_state_before(tmp_path: Path):
    program = f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest
        import test_checkpoint as here
        from middo_jax.training.checkpoint import TrainingCheckpoints
        mesh = here.mesh_of(1, 1, 1)
        checkpoints = TrainingCheckpoints({str(tmp_path)!r}, "a", asynchronous=True)
        checkpoints.save(here.state_at(1, mesh))
        checkpoints._orbax.wait_until_finished()
        checkpoints.save(here.state_at(2, mesh))
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    with TrainingCheckpoints(tmp_path, "a", asynchronous=True) as checkpoints:
        restored = checkpoints.restore(*targets(mesh_of(1, 1, 1)))
    assert restored is not None
    # Very quick disks may have finished the second; half of it is never seen.
    assert restored.step in (1, 2)
    assert_identical(restored.trained, state_at(restored.step, mesh_of(1, 1, 1)).trained)


def test_metadata_is_plain_json(tmp_path: Path):
    save_params(tmp_path, params_on(mesh_of(1, 1, 1)), {"base": "with space/ünïcode", "step": 1})
    assert (
        json.loads((tmp_path / "metadata.json").read_text(encoding="utf-8"))["base"] == "with space/ünïcode"
    )
