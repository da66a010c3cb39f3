"""Two hosts on one machine: network namespaces with names and addresses of their own, and a cable to cut.

    with two_hosts(tmp_path) as hosts:
        Popen([*hosts.inside(0), "python", ...])
        hosts.cut()

All of it ends with the block, or with this process.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("first-host", "second-host")

_OWN = ("--net", "--mount", "--uts")  # namespaces of a host; files are shared, but not what is mounted
# Keeps the namespaces until its input ends.
_HOLD = """
import socket, subprocess, sys
name, hosts = sys.argv[1:]
socket.sethostname(name)
subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
print("ready", flush=True)
sys.stdin.read()
"""


class TwoHosts(NamedTuple):
    """The processes that hold the namespaces of two hosts."""

    holders: list[subprocess.Popen[str]]

    def inside(self, host: int) -> list[str]:
        """What precedes a command that runs on a host."""
        return ["nsenter", f"--target={self.holders[host].pid}", *_OWN, "--wd"]

    def cut(self) -> None:
        """Nothing reaches the other host any more, and no connection is closed."""
        self._set_link(1, "down")

    def join(self) -> None:
        """Connects the hosts, again after `cut`."""
        for host in (0, 1):
            self._set_link(host, "up")

    def _set_link(self, host: int, state: str) -> None:
        subprocess.run([*self.inside(host), "ip", "link", "set", "eth0", state], check=True)


def why_not() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    missing = [name for name in ("unshare", "nsenter", "ip", "mount") if shutil.which(name) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)}"
    needed = "ip link add eth0 type veth peer name eth1 && mount --bind /dev/null /etc/hosts"
    tried = subprocess.run(
        ["unshare", *_OWN, "sh", "-c", needed], capture_output=True, text=True, check=False
    )
    return f"network namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Two hosts that reach each other; `folder` takes their /etc/hosts."""
    names = folder / "hosts"
    lines = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        holders = []
        for name in NAMES:
            command = ["unshare", *_OWN, sys.executable, "-c", _HOLD, name, str(names)]
            pipe = subprocess.PIPE
            holder = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            holders.append(holder)
        hosts = TwoHosts(holders)
        peer = ["peer", "name", "eth0", "netns", str(holders[1].pid)]
        cable = ["ip", "link", "add", "eth0", "netns", str(holders[0].pid), "type", "veth", *peer]
        subprocess.run(cable, check=True)
        for host, address in enumerate(ADDRESSES):
            subprocess.run(
                [*hosts.inside(host), "ip", "addr", "add", f"{address}/24", "dev", "eth0"], check=True
            )
        hosts.join()
        yield hosts
