"""Work in the background of two processes, which are threads here."""

import threading
import time

import pytest

from moi_jax.parallel.hosts import Hosts
from moi_jax.parallel.shared_work import PAUSE, FailedElsewhere, SharedWork

from support.key_values import Store


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def works(store):
    made = [SharedWork(Hosts(store, index, ["process 0", "process 1"], None)) for index in range(2)]
    yield made
    for work in made:
        work.succeed()


def later(work, *arguments):
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    return thread


@pytest.mark.parametrize("failing", [0, 1])
def test_who_waits_for_a_process_that_fails_gives_up_and_knows_why(works, failing):
    other = works[1 - failing]
    thread = later(lambda: (time.sleep(0.2), works[failing].fail({"why": "full"})))
    with pytest.raises(FailedElsewhere):
        other.wait_for_all("written", 60, gives_up=True)
    thread.join()
    other.fail({"why": "the consequence"})
    assert [work.failure() for work in works] == [{"why": "full", "process": failing}] * 2
    # At the end of the failed work they still meet, however late one comes.
    thread = later(
        lambda: (time.sleep(3 * PAUSE), works[0].wait_for_all("ended", 60, gives_up=False))
    )
    works[1].wait_for_all("ended", 60, gives_up=False)
    thread.join()


def test_a_place_may_be_reached_twice_and_not_alone(works):
    for _ in range(2):
        begin = time.monotonic()
        thread = later(lambda: (time.sleep(0.3), works[0].wait_for_all("here", 60, True)))
        works[1].wait_for_all("here", 60, gives_up=True)
        assert time.monotonic() - begin >= 0.3
        thread.join()


def test_a_process_that_does_not_come_is_waited_for_no_longer_than_allowed(works):
    with pytest.raises(TimeoutError, match="another host"):
        works[1].wait_for_all("here", 0.1, gives_up=True)


def test_nothing_is_left_of_work_that_is_forgotten(store, works):
    works[1].fail({"why": "full"})
    works[1].forget()
    assert store.values
    works[0].forget()
    assert not [key for key in store.values if "failure" in key or "signal" in key]
