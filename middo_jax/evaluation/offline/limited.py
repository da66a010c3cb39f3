"""The program in which code of a model runs: `python -I limited.py FILE`, started by `execution`.

It reads the limits and a token, as a line of JSON, from stdin; limits itself; runs FILE; and writes the token
to stdout if FILE came to its end. FILE's own output goes nowhere. It uses the standard library alone, because
`-I` keeps the package out of reach.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000  # of <sched.h>
DIE_WITH_PARENT = 1  # of <sys/prctl.h>
CAPABILITY_VERSION = 0x20080522  # of <linux/capability.h>
NOBODY = 65534


def main() -> None:
    """Runs the file named on the command line."""
    wanted = json.loads(sys.stdin.readline())
    is_root = os.getuid() == 0
    if is_root:
        # The kernel does not count root's processes. Files are still opened as root, so that Python finds its
        # modules, and the capabilities are gone below.
        os.setresuid(NOBODY, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    is_apart = libc.unshare(NEW_USER | NEW_PID | NEW_NET) == 0
    if is_root and not is_apart:
        drop_capabilities(libc)
    # A new process is the first of the new namespace: when it ends, the kernel ends all that it started.
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)  # as a shell reports a signal
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    limit(wanted)
    run(sys.argv[1], wanted["token"])


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Gives up all of root's rights but those of the owner of its files."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())


def limit(wanted: dict[str, int]) -> None:
    """Sets the limits of this process and of all that it starts."""
    for kind, value in (
        (resource.RLIMIT_CPU, wanted["cpu_s"]),
        (resource.RLIMIT_AS, wanted["memory_bytes"]),
        (resource.RLIMIT_DATA, wanted["memory_bytes"]),
        (resource.RLIMIT_FSIZE, wanted["file_bytes"]),
        (resource.RLIMIT_NOFILE, wanted["open_files"]),
        (resource.RLIMIT_NPROC, wanted["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError):  # the present limit is lower
            resource.setrlimit(kind, (value, value))


def run(file: str, token: str) -> None:
    """Runs a file and, if it comes to its end, reports the token."""
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        with open(file, encoding="utf-8") as source:
            code = compile(source.read(), file, "exec")
        exec(code, {"__name__": "__main__"})
    except BaseException as error:  # also SystemExit: a program that exits has not come to its end
        os.write(report, json.dumps({"error": type(error).__name__}).encode() + b"\n")
        os._exit(1)
    os.write(report, json.dumps({"token": token}).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
