"""The end of a run whose rounds may end early (`stop.patience`): the best training becomes `final`."""

from __future__ import annotations

import time

from middo_jax.data.stored import Stored
from middo_jax.exporting import own_shape, write_as_it_came
from middo_jax.rundir import RunDir, write_jsonl
from middo_jax.rundir.files import copy_folder
from middo_jax.rundir.link import Link
from middo_jax.rundir.stopping import course
from middo_jax.session import Session


def best_stage(session: Session, run: RunDir, link: Link) -> None:
    """Copies the dataset and the checkpoint of the best training to `final`; process 0 alone does it."""
    began, begun, final, chosen = time.monotonic(), link.begin(), link.folder, link.earlier
    assert chosen is not None
    for stage in ("prepare", "train", "benchmark"):  # of a run without `stop.patience`
        final.forget(stage)
    for path in (final.metrics, final.evaluations, final.benchmarks):
        path.unlink(missing_ok=True)
    copy_folder(chosen.checkpoint, final.checkpoint)
    examples = Stored(chosen.dataset)
    write_jsonl(final.dataset, (example.to_json() for example in examples))
    form = write_as_it_came(run, examples, final.own_format, session.progress)
    facts = {"format": form, "shape": own_shape(run).to_json()}
    facts |= {"round": chosen.path.name, "why": course(run, session.config).why}
    begun.finish(session.config, time.monotonic() - began, n=len(examples), **facts)
