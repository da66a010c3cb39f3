"""The law of many hosts: two processes measure what one does, also where the pass was stopped.

Each tokenizes a share and what its own devices read, packs the latter only, and takes what a job of another
number of processes has left.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.processes import run_together
from support.tiny_model import write_tiny_model

# Every process writes what it ended up with: all must hold all of it.
PROGRAM = """
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

directory, out, address, processes, process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 8 // int(processes))
if int(processes) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(process), initialization_timeout=120)

from middo_jax.config import MeshSettings, TrainSettings
from middo_jax.data.lazy import Lazy
from middo_jax.data.packing import pack
from middo_jax.data.tokenize import TokenizedExample
from middo_jax.data.trees import Tree, trie
from middo_jax.signals.judge.questions import RatingTokens
from middo_jax.signals.judge.readout import EXPECTED
from middo_jax.signals.neighbours.search import nearest_neighbours
from middo_jax.passes import runner
from middo_jax.passes.loss_plan import Outline
from middo_jax.passes.losses import LossPass, score_examples
from middo_jax.passes.parts import Parts
from middo_jax.passes.ratings import RatingScale, _outline, rate
from middo_jax.passes.runner import PassPlan
from middo_jax.models import hf
from middo_jax.parallel.coordination import HostsError, barrier
from middo_jax.parallel.hosts import gather_rows, own_spans, share_of
from middo_jax.parallel.mesh import make_mesh
from middo_jax.parallel.preemption import Preempted
from middo_jax.progress import Silent
from middo_jax.rundir.files import only_read
from middo_jax.stages.shared_tokens import SharedTokens
from middo_jax.training.feed import feed
from middo_jax.training.identity import identity, of_model
from middo_jax.training.plan import TrainingPlan
from middo_jax.training.step import own_rows

assert len(jax.devices()) == 8 and jax.process_count() == int(processes)
rng = np.random.default_rng(0)
examples = []
for i, length in enumerate(rng.integers(4, 120, 24)):
    at = np.arange(length)
    tokens = rng.integers(3, 390, length).astype(np.int32)
    examples.append(TokenizedExample(str(i), tokens, at >= length // 2, at < length // 2, False))

class Question(NamedTuple):
    tree: Tree
    read_positions: list

class Watched(list):
    read = set()  # what was packed

    def __getitem__(self, i):
        self.read.add(i)
        return super().__getitem__(i)

mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
model = hf.load(directory, mesh=mesh)
watched = Watched(examples)
scores, whole = score_examples(model, watched, batch_tokens=512, chunk=64)
read = sorted(watched.read)

# Tokenized in shares, and then what the own devices read: the same plan, and the same results.
tokenized = set()

def tokenize(indices):
    tokenized.update(indices)
    return [examples[i] for i in indices]

ids = [example.id for example in examples]
shared = SharedTokens(ids, tokenize)
planned = LossPass(shared, model, 512, 64, outline=shared.outline(prompts=False))
assert planned.plan.buckets == LossPass(examples, model, 512, 64).plan.buckets
for one, other in zip(planned(model, Silent(), "loss")[0], scores, strict=True):
    np.testing.assert_array_equal(one, other)
assert tokenized == {*range(int(process), len(examples), int(processes)), *read}

def begun_alike(example):
    masks = [np.append([False] * 12, mask) for mask in (example.is_target_n, example.in_prompt_n)]
    return TokenizedExample(example.id, np.append(np.arange(3, 15), example.tokens_n), *masks, False)

begun = list(map(begun_alike, examples))
shared = SharedTokens(ids, lambda indices: [begun[i] for i in indices])
some = [2, 20, 4, 6]  # of the second process's share there is none
for prompts in (False, True):
    for which in (range(24), some, []):
        ours, theirs = shared.chosen(which), [begun[i] for i in which]
        outline, expected = ours.outline(prompts=prompts), Outline.of(theirs, prompts=prompts)
        for one, other in zip(outline, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        # The last token that all share predicts the first one of the prompt.
        assert outline.prefix == (0 if not theirs else 11 if prompts else 12)

# A training: the facts, steps, identity and batches of one process, which has all tokens.
tokenized.clear()
shared, settings = SharedTokens(ids, tokenize), TrainSettings(batch_size=8, gradient_accumulation=2)
ours, theirs = (TrainingPlan(of, settings, 3, 128) for of in (shared, examples))
for one, other in zip(ours.facts, theirs.facts, strict=True):
    np.testing.assert_array_equal(one, other)
assert ours.steps == theirs.steps and identity(model, ours) == identity(model, theirs)
own = own_rows(settings, mesh)
assert len(own) == 8 // int(processes)
trained = set()
for step, (batch, _) in zip(ours.steps, feed(shared, ours.steps, settings, 128, mesh), strict=True):
    trained.update(i for row in own if row < len(step.rows) for i in step.rows[row])
    packed = pack(examples, step.rows, 8, 128, 128)
    for name, values in batch._asdict().items():
        expected = getattr(packed, name).reshape(2, 4, 128)
        for shard in values.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
assert tokenized == {*range(int(process), len(examples), int(processes)), *trained}
assert int(processes) == 1 or len(tokenized) < len(examples)
try:
    gather_rows("facts", [], np.zeros((0, 1), np.int32), int(process))
    assert int(processes) == 1
except HostsError as error:
    assert "the processes have 0, 1 examples (facts)" in str(error)

# Stopped behind its first batch, and gone on: what process 0 has written, all processes read.
if int(process):
    only_read()
asked, batches = runner.stop_point, itertools.count()

def stop_point():
    asked()
    if next(batches) == 1:
        raise Preempted

def resumable():
    parts = Parts(Path(out).parent / f"parts{processes}", of_model(model), Silent(), "loss")
    return LossPass(examples, model, 512, 64)(model, Silent(), "loss", parts)

runner.stop_point = stop_point
try:
    resumable()
    raise AssertionError("it was not stopped")
except Preempted:
    barrier("stopped")
runner.stop_point = asked
pack, packed = PassPlan.packed, []
PassPlan.packed = lambda *a: packed.append(a) or pack(*a)
resumed, rest = resumable()
assert 0 < rest.computed_tokens < whole.computed_tokens
buckets = planned.plan.buckets
to_compute = sum(len(list(bucket.batches())) for bucket in buckets) - 1  # and one of each shape to compile it
spans = [len(own_spans(mesh, bucket.batch)) for bucket in buckets]
assert len(set(spans)) == 1 and len(packed) == spans[0] * (to_compute + len(buckets))  # each batch once
for one, other in zip(resumed, scores, strict=True):
    np.testing.assert_array_equal(one, other)

# Ratings: the questions of a share, and those in the rows of the own devices.
def question(i):
    text = np.append(np.arange(3, 23), np.random.default_rng(i).integers(3, 390, 5 + 4 * i))
    return Question(*trie([np.append(text, end).astype(np.int32) for end in (7, 8)]))

asked = [question(i) for i in range(24)]
made = set()
lazy = Lazy(ids, lambda some: [made.add(i) or asked[i] for i in some], share_of(24))
scale = RatingScale(RatingTokens((), tuple(range(100, 111)), None), EXPECTED, 2)
assert _outline(lazy) == _outline(asked) and _outline(asked)[1] == 20
assert made == set(share_of(24))
ratings, _ = rate(model, lazy, scale, batch_tokens=512)
assert int(processes) == 1 or len(made) < 24

found = nearest_neighbours(scores.embedding_nd, 3, mesh, block=2)
if int(processes) == 1:  # a batch has the same key in a job with the same mesh, so nothing is left to do
    parts = Parts(Path(out).parent / "parts2", of_model(model), Silent(), "loss")
    of_two, facts = LossPass(examples, model, 512, 64)(model, Silent(), "loss", parts)
    assert facts.computed_tokens == 0
    np.testing.assert_allclose(of_two.loss_n, scores.loss_n, rtol=1e-5)
np.savez(out, **scores._asdict(), **found._asdict(), ratings=ratings, read=read)
"""


@pytest.mark.multiprocess
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model")
    run_together(2, lambda process: ["-c", PROGRAM, directory, tmp_path / f"{process}.npz"])
    run_together(1, lambda _: ["-c", PROGRAM, directory, tmp_path / "alone.npz"])

    alone = np.load(tmp_path / "alone.npz")
    first, second = (set(np.load(tmp_path / name)["read"].tolist()) for name in ("0.npz", "1.npz"))
    assert first | second == set(alone["read"].tolist()) == set(range(24))
    assert first & second <= {0}  # whose dtypes are those of a part of a batch that is padding only
    for name in ("0.npz", "1.npz"):
        shared = np.load(tmp_path / name)
        assert set(shared) == set(alone)
        np.testing.assert_array_equal(shared["n_targets_n"], alone["n_targets_n"])
        np.testing.assert_array_equal(shared["index_nj"], alone["index_nj"])
        for floats in ("loss_n", "embedding_nd", "similarity_nj", "ratings"):
            assert np.isfinite(shared[floats]).all()
            np.testing.assert_allclose(shared[floats], alone[floats], rtol=1e-5, atol=1e-5)
