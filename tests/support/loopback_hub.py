"""A hub on the loopback interface, for huggingface_hub's own client: dataset repositories and commits.

with loopback_hub() as hub:
    ...  # HfApi() talks to it
hub.files["me/mine"]["README.md"]
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import constants
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from middo_jax.inference.listening import serve_in_background

TOKEN = "hf_marker_5f0e9d1c7a"  # the one that may write


class LoopbackHub:
    """What a hub keeps.

    Attributes:
      repos: whether each repository is private.
      files: contents by repository and path.
      commits: the message of each commit, by repository.
      posted: the paths of all requests that change something.
      refuses: what the next commit is answered with; None accepts it.
    """

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.posted: list[str] = []
        self.refuses: tuple[int, str] | None = None

    def routes(self) -> list[Route]:
        repo = "/api/datasets/{owner}/{name}"
        return [
            Route(repo, self._info),
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/validate-yaml", self._validate, methods=["POST"]),
            Route(repo + "/preupload/main", self._preupload, methods=["POST"]),
            Route(repo + "/commit/main", self._commit, methods=["POST"]),
        ]

    def _refusal(self, request: Request) -> Response | None:
        if request.method == "POST":
            self.posted.append(request.url.path)
        if request.headers.get("authorization") == f"Bearer {TOKEN}":
            return None
        return JSONResponse({"error": "Invalid username or password."}, 401)

    async def _info(self, request: Request) -> Response:
        name = _name(request)
        if refusal := self._refusal(request):
            return refusal
        if name not in self.repos:
            return Response(status_code=404, headers={"X-Error-Code": "RepoNotFound"})
        return JSONResponse({"id": name, "private": self.repos[name], "sha": "0" * 40})

    async def _create(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        asked = await request.json()
        assert asked["type"] == "dataset"
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return JSONResponse({"error": "You already created this dataset repo"}, 409)
        if asked["organization"] != "me":
            return JSONResponse(
                {"error": f"You don't have the rights to create in {asked['organization']}"}, 403
            )
        self.repos[name] = asked.get("private", asked.get("visibility") == "private")
        return JSONResponse({"url": f"{constants.ENDPOINT}/datasets/{name}"})

    async def _validate(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        files = (await request.json())["files"]
        told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
        return JSONResponse({"files": told})

    async def _commit(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        if self.refuses:
            status, error = self.refuses
            return JSONResponse({"error": error}, status)
        name, lines = _name(request), [json.loads(line) for line in (await request.body()).splitlines()]
        kept: dict[str, Any] = self.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.setdefault(name, []).append(value["summary"])
            else:
                assert line["key"] == "file"
                kept[value["path"]] = base64.b64decode(value["content"])
        url = f"{constants.ENDPOINT}/datasets/{name}/commit/{'1' * 40}"
        return JSONResponse({"commitUrl": url, "commitOid": "1" * 40})


def _name(request: Request) -> str:
    return f"{request.path_params['owner']}/{request.path_params['name']}"


@contextlib.contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A hub to which huggingface_hub's client talks while the block runs."""
    hub = LoopbackHub()
    with serve_in_background(Starlette(routes=hub.routes())) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url.removesuffix("/v1"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
