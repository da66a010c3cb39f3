"""Serves an ASGI application on a socket: on a thread of its own, or until interrupted."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from middo_jax.config import ConfigError

SHUTDOWN_GRACE_S = 2  # for requests in flight when the server is told to stop
WATCH_S = 0.5  # between two looks at the engine


@contextlib.contextmanager
def serve_in_background(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serves on a thread of its own while the block runs; yields `http://HOST:PORT/v1`.

    Args:
      app: from `build_app`.
      host: an address of this machine.
      port: 0 takes a free one.

    Raises:
      ConfigError: the address cannot be bound.
      RuntimeError: the server ended before it answered; its log says why.
    """
    with _listen(host, port) as listener:
        server = _server(app)
        # A daemon: a server that does not stop must not keep the program from ending.
        thread = threading.Thread(target=server.run, args=([listener],), name="middo-serve", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError(f"the embedded endpoint on {_url(listener)} ended before it answered")
                time.sleep(0.01)
            yield _url(listener)
        finally:
            server.should_exit = True
            thread.join()


def serve_forever(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> None:
    """Serves until interrupted; prints the address on stderr.

    Raises:
      ConfigError: the address cannot be bound.
      RuntimeError: the engine has ended. A server without one could only refuse; whoever started it can start
        it again.
    """
    with _listen(host, port) as listener:
        print(f"serving on {_url(listener)} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        server = _server(app)
        thread = threading.Thread(target=_watch, args=(app, server), name="middo-watch", daemon=True)
        thread.start()
        with contextlib.suppress(KeyboardInterrupt):
            server.run([listener])
        server.should_exit = True
        thread.join()
    if not app.state.engine.is_running:
        raise RuntimeError("the engine has ended, see the log above; start the server again")


def _watch(app: Starlette, server: uvicorn.Server) -> None:
    """Stops a server whose engine has ended."""
    while not server.should_exit:
        time.sleep(WATCH_S)
        server.should_exit |= not app.state.engine.is_running


def _listen(host: str, port: int) -> socket.socket:
    # Bound here and handed over: between finding a free port and binding it, another program could take it.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"config: cannot listen on {host}, port {port}: {error}; port 0 takes a free one"
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _server(app: Starlette) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        )
    )
