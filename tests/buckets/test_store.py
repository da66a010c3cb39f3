"""Objects on real servers: written whole, created once, and errors that say what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.bucket_servers import store_of

from middo_jax.buckets import store as stores
from middo_jax.buckets.places import Place
from middo_jax.buckets.store import BucketError
from middo_jax.rundir import RunError

pytest_plugins = ["support.bucket_servers"]
pytestmark = pytest.mark.usefixtures("own_copies")


def test_objects_are_listed_read_replaced_and_removed(bucket: str, tmp_path: Path) -> None:
    store, file = store_of(bucket), tmp_path / "a"
    assert store.list() == {}
    file.write_bytes(b"one")
    first = store.put(file, "folder/a.json")
    store.put_text("text", "b")
    found = store.list()
    assert {name: stored.size for name, stored in found.items()} == {"folder/a.json": 3, "b": 4}
    assert found["folder/a.json"].version == first
    assert store.info("folder/a.json") == found["folder/a.json"]
    assert (store.info("folder"), store.info("none"), store.read("none")) == (None, None, None)
    file.write_bytes(b"two")
    assert store.put(file, "folder/a.json") != first
    store.get("folder/a.json", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]
    assert store_of(f"{bucket}/folder/a.json").list()[""].size == 3
    for _ in range(2):
        store.remove("b")
    assert [*store.list()] == ["folder/a.json"]


def test_a_large_file_comes_back_as_it_was(bucket: str, tmp_path: Path) -> None:
    store, file = store_of(bucket), tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * (24 << 10))  # 6 MiB: Google's clients send it in pieces
    store.put(file, "weights")
    store.get("weights", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()


def test_an_object_is_created_once(bucket: str) -> None:
    store = store_of(bucket)
    assert store.create("mine", "lock")
    assert not store.create("yours", "lock")
    assert store.read("lock") == "mine"


def test_a_missing_bucket_is_named(bucket: str) -> None:
    missing = store_of(f"{bucket[:5]}no-such-bucket/runs")
    with pytest.raises(BucketError, match=r"no-such-bucket/runs: there is no bucket 'no-such-bucket'"):
        missing.list()
    with pytest.raises(BucketError, match="no-such-bucket"):
        missing.create("", "lock")


def test_missing_credentials_are_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BucketError, match=r"no credentials for it: set \$AWS_ACCESS_KEY_ID"):
        store_of(s3).list()


def test_a_server_that_is_away_is_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(stores, "_RETRIES", {"max_attempts": 1, "mode": "standard"})
    with pytest.raises(BucketError, match="its server cannot be reached"):
        store_of(s3).list()


@pytest.mark.parametrize(
    ("package", "url", "extra"), [("s3fs", "s3://b", "s3"), ("gcsfs.core", "gs://b", "gcs")]
)
def test_a_missing_package_is_named(
    package: str, url: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores._file_system.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RunError, match=rf"pip install 'middo-jax\[{extra}\]'"):
        store_of(url)


def test_an_object_that_would_be_a_file_outside_is_refused(s3: str) -> None:
    place = Place.of(s3)
    assert place is not None
    fs = stores._file_system("s3")
    fs.pipe_file(f"bucket/{place.path}/../../.bashrc", b"no")
    with pytest.raises(RunError, match="cannot be a file here"):
        store_of(s3).list()
