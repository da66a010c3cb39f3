"""A program of a job of several processes, which does one small thing with the others.

python job.py FOLDER THING ADDRESS PROCESSES PROCESS
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from middo_jax.parallel import cluster, coordination, watch
from middo_jax.parallel.coordination import agree, barrier, follow, from_first, lead, shared_secret
from middo_jax.progress import Lines


def decide(me: int) -> None:
    """Process 0 decides, slowly; a value larger than one message arrives whole. Then all share a secret."""
    calls = []
    value = from_first(
        "decide", lambda: (calls.append(me), time.sleep(3), {"n": 3, "text": "ü" * 3_000_000})[2]
    )
    barrier("decided")
    print("decided", value["n"], len(value["text"]), "asked" if calls else "told")
    secret = shared_secret("token")
    assert secret is not None
    barrier("shared")
    left = [key for key, text in coordination._store().key_value_dir_get("middo/") if secret in text]
    print("secret", len(secret), hashlib.sha256(secret.encode()).hexdigest(), left)


def led(me: int) -> None:
    """Process 0 tells the others three things to do, and works alone in between."""
    done = []
    if me == 0:
        with lead("work") as together:
            for number in range(3):
                time.sleep(1)
                with together(number):
                    barrier("together")
                done.append(number)
    else:
        for number in follow("work"):
            barrier("together")
            done.append(number)
    print("did", done)


def differ(me: int) -> None:
    """The last process has other data."""
    agree({"settings": "a", "data": "b" if me + 1 < jax.process_count() else "c"})


def fail(me: int) -> None:
    """Process 1 fails, where the others wait for it."""
    if me == 1:
        raise ValueError("a broken host")
    barrier("never")


def vanish(me: int) -> None:
    """Process 1 is killed, where the others wait for it."""
    if me == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier("never")


def lost(me: int) -> None:
    """Process 1 is killed, and the collective of the others breaks before the watch can say why."""
    multihost_utils.process_allgather(np.ones(1))
    if me == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    multihost_utils.process_allgather(np.ones(1))


def stall(me: int) -> None:
    """Process 1 does nothing any more, where the others wait for it."""
    if me == 1:
        while True:
            time.sleep(1)
    watch.advanced("the pass")
    barrier("after the pass")


def frozen(me: int) -> None:
    """Process 0 is alive and answers nothing, as if the others were cut off; in the end it is killed."""
    barrier("all are watched")
    if me == 0:
        subprocess.Popen(["sh", "-c", f"sleep 30; kill -KILL {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    barrier("never")


def preempted_alone(me: int) -> None:
    """The last process is told to stop while process 0 works and the others wait."""
    if me + 1 == jax.process_count():
        os.kill(os.getpid(), signal.SIGTERM)
    from_first("long work", lambda: time.sleep(120))


if __name__ == "__main__":
    folder, thing, address, processes, process = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 1)
    watch.POLL_S, watch.DEAD_AFTER_S, watch.END_AFTER_S = 0.5, 6.0, 3.0
    job = cluster.find_job({}, address, int(processes), int(process))
    assert job is not None
    cluster.start(job, Lines(), Path(folder), timeout_s=120)
    watch.Watch(stall_timeout_s=float(os.environ.get("STALL", "60"))).start()
    try:
        globals()[thing](int(process))
    except SystemExit:
        coordination.tell_good_end()
        raise
    except Exception as error:
        traceback.print_exc()
        coordination.leave(error)
    coordination.tell_good_end()
