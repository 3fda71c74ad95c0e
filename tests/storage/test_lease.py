"""One writer: of two who want to write, one is refused."""

import time

import pytest

from moi_jax.common.errors import UserError
from moi_jax.storage.lease import LEASE, Lease
from moi_jax.storage.store import Store

STALE = 2.0  # seconds


@pytest.fixture
def store(s3, request):
    return Store(s3.place(f"lease/{request.node.name}"))


def test_a_second_run_is_refused_while_the_first_one_writes(store):
    lease = Lease(store, "mine", STALE)
    assert not lease.continued
    with pytest.raises(UserError, match="is in use by another run, on"):
        Lease(store, "other", 60)
    lease.check()
    lease.release()


def test_who_writes_next_knows_whether_somebody_else_has_written(store):
    for owner, continued in (("mine", False), ("mine", True), ("other", False), ("mine", False)):
        lease = Lease(store, owner, STALE)
        assert lease.continued == continued
        lease.release()


def test_who_has_only_held_it_has_not_written(store):
    for owner, written, continued in (
        ("mine", True, False),
        ("other", False, False),
        ("mine", True, True),
    ):
        lease = Lease(store, owner, STALE)
        assert lease.continued == continued
        lease.release(written=written)


def test_the_lease_of_a_dead_run_is_taken_when_its_heartbeat_stands_still(store):
    dead = Lease(store, "dead", STALE)
    dead._released.set()  # as after a kill: it neither beats nor releases
    dead._thread.join()
    began = time.monotonic()
    lease = Lease(store, "mine", STALE)
    assert time.monotonic() - began > STALE
    with pytest.raises(UserError, match="another run has taken over"):
        dead._renew()
    lease.check()
    lease.release()


def test_the_same_copy_on_the_same_machine_need_not_wait(store, log_text):
    dead = Lease(store, "mine", 30)
    dead._released.set()
    dead._thread.join()
    lease = Lease(store, "mine", 30)
    assert lease.continued
    assert "waiting" not in log_text.getvalue()
    lease.release()


def test_a_run_whose_lease_was_taken_ends(store):
    lease = Lease(store, "mine", STALE)
    store.write(LEASE, b'{"owner": "other"}')
    lease._thread.join(timeout=60)  # its next heartbeat is its last
    with pytest.raises(UserError, match="another run has taken over"):
        lease.check()
    lease.release()
    assert store.read(LEASE) == b'{"owner": "other"}'
