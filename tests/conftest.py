"""Test session: eight simulated devices, float32 matmuls, a compilation cache that outlives the session."""

import gc
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Simulated devices: XLA's CPU scheduler may start a program's independent all-reduces in another order on
# each, and then they wait for each other; and eight of them on two cores are slow, which is no deadlock.
# Tiny models spend their time in the compiler: its older emitters take a third of it. XLA is about to
# retire them, and ends at a flag that it does not know.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "--xla_cpu_collective_call_terminate_timeout_seconds=180",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    ]
).strip()
# Processes that a test starts can import tests/support, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
)
# By environment, so that the processes that tests start share it. Small programs are most of them.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# A busy machine is no failure.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")

# A shell's background jobs, hence many CI runners, ignore Ctrl-C and hand that down; some tests send one.
signal.signal(signal.SIGINT, signal.default_int_handler)


AS_IN_USE = ("as_in_use", "real_model", "tpu_compile", "gpu")
SWITCH = "JAX_DISABLE_MOST_OPTIMIZATIONS"
is_for_all = SWITCH in os.environ


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tiny models spend their time in the compiler, which does less for them and the processes they start.

    JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment compiles every test as in use.
    """
    exempt_the_living(item.path)
    wanted = str(int(not any(map(item.get_closest_marker, AS_IN_USE))))
    if is_for_all or wanted == os.environ.get(SWITCH):
        return
    jax.clear_caches()  # what is compiled already would be taken again
    jax.config.update("jax_disable_most_optimizations", wanted == "1")
    os.environ[SWITCH] = wanted


_exempt: tuple[Path, int] | None = None  # file of tests, number of hundreds of modules


def exempt_the_living(path: Path) -> None:
    """Exempts from garbage collections what lives when a file of tests begins, or many modules are new.

    Stages collect garbage to free memory of devices. A collection visits every object, and most of them live
    until the end: imported modules, collected tests, JAX's caches. That took seconds each time.
    """
    global _exempt
    if (now := (path, len(sys.modules) // 100)) != _exempt:
        gc.collect()
        gc.freeze()
        _exempt = now
