"""The lock of a folder in a bucket: one owner, kept fresh, removed only if its owner is gone."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest

from middo_jax.buckets import lease as leases
from middo_jax.buckets.lease import leased
from middo_jax.buckets.names import LOCK
from middo_jax.buckets.places import Place
from middo_jax.buckets.store import Store
from middo_jax.rundir.lock import Owner, RunLocked

pytest_plugins = ["support.bucket_servers"]
pytestmark = pytest.mark.usefixtures("own_copies")


@pytest.fixture
def store(bucket: str) -> Store:
    place = Place.of(bucket)
    assert place is not None
    return Store(place)


def elsewhere() -> Owner:
    """A process of another host, of which nothing is known here."""
    return dataclasses.replace(Owner.this_process(), host="pod-7", boot="another")


def lock(store: Store, owner: Owner) -> None:
    store.put_text(json.dumps(dataclasses.asdict(owner)) + "\n", LOCK)


def test_a_lock_keeps_others_out_and_is_removed_at_the_end(store: Store) -> None:
    said = list[str]()
    with leased(store, said.append) as lease:
        lease.check()
        assert store.read(LOCK) is not None
        with (
            pytest.raises(RunLocked, match=r"is locked by `.*` \(process \d+ on .*wait until it ends"),
            leased(store, said.append),
        ):
            pass
    assert store.list() == {}
    assert said == []


def test_the_lock_of_a_process_that_has_ended_on_this_host_is_removed(store: Store) -> None:
    lock(store, dataclasses.replace(Owner.this_process(), pid=2**22 + 1))
    said = list[str]()
    with leased(store, said.append):
        pass
    assert "removed the lock of" in said[0]
    assert store.list() == {}


def test_a_lock_of_another_host_is_removed_when_it_has_expired(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ALIVE_S": -9.0, "EXPIRES_S": 2.0, "_POLL_S": 0.5}.items():
        monkeypatch.setattr(leases, name, value)
    lock(store, elsewhere())
    said = list[str]()
    leases._take(store, said.append).release()
    assert "waiting for up to" in said[0]
    assert "removed the lock of" in said[1]


def test_a_lock_of_another_host_that_is_kept_fresh_is_respected(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ALIVE_S": -9.0, "EXPIRES_S": 60.0, "_POLL_S": 1.2}.items():
        monkeypatch.setattr(leases, name, value)
    owner = elsewhere()
    lock(store, owner)
    timer = threading.Timer(1.1, lock, (store, owner))  # clocks of buckets count seconds
    timer.start()
    with pytest.raises(RunLocked, match="pod-7"):
        leases._take(store, lambda line: None)
    timer.join()
    assert Owner.of(store.read(LOCK) or "") == owner


def test_a_damaged_lock_is_respected(store: Store) -> None:
    store.put_text("{", LOCK)
    with pytest.raises(RunLocked, match="does not say by whom"), leased(store, lambda line: None):
        pass


def test_who_has_lost_the_lock_writes_nothing(store: Store) -> None:
    with leased(store, lambda line: None) as lease:
        lock(store, elsewhere())
        lease._refresh()
        with pytest.raises(RunLocked, match=r"could not keep its lock.*now it is locked by .*pod-7"):
            lease.check()
    assert store.read(LOCK) is not None  # the other's


def test_who_could_not_refresh_for_long_asks_before_it_writes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leased(store, lambda line: None) as lease:
        monkeypatch.setattr(leases, "TRUST_S", -1.0)
        lease.check()
        monkeypatch.setattr(leases, "EXPIRES_S", -1.0)
        with pytest.raises(RunLocked, match="could not keep its lock"):
            lease.check()
