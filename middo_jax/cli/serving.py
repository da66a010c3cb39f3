"""The command that serves a model: serve."""

from __future__ import annotations

from typing import Annotated

import typer

from middo_jax.cli.options import MODEL_HELP, Overrides
from middo_jax.cli.program import app


@app.command(epilog="Example: middo serve ./tuned --port 8000")
def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 8000,
    overrides: Overrides = None,
) -> None:
    """Serves a model by an OpenAI-compatible endpoint, on loopback unless --host is given.

    Other addresses need a token in $MIDDO_SERVE_TOKEN, which clients send as their API key.
    """
    from middo_jax.inference.guard import Access
    from middo_jax.inference.listening import serve_forever
    from middo_jax.inference.server import build_app, load_engine
    from middo_jax.models.resolve import resolve, served_name
    from middo_jax.session import new_session

    access = Access.to(host)  # before the model is loaded: it may refuse
    path = resolve(model)
    named = {"model.path": str(path), "data.path": "none"}
    session = new_session([named, *(overrides or ())])
    config = session.config
    engine, tokenizer, eos_ids = load_engine(path, config.serve, config.model.dtype, mesh=session.mesh)
    with engine:
        serve_forever(build_app(engine, tokenizer, served_name(model), eos_ids, access), host, port)
