"""The watch of one process over the others, without the others."""

import json
import sys

import pytest

from moi_jax.parallel.watch import Watch


class LeavingStore:
    """Process 0, which runs the store, has left when process 1 asks for the first failure."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value

    def key_value_try_get(self, key):
        self.leave()

    def key_value_dir_get(self, key):
        return []


def test_a_process_keeps_its_reason_when_process_0_leaves_as_soon_as_it_has_heard(
    monkeypatch, capfd
):
    monkeypatch.setattr("moi_jax.parallel.watch.os._exit", sys.exit)
    store = LeavingStore()
    watch = Watch(store, 1, ["process 0", "process 1"], 600)
    # As jax's abort does, from a thread of its own.
    store.leave = lambda: watch.end_without_coordinator("its connection is closed")
    with pytest.raises(SystemExit) as ended:
        watch.tell(2, "there is no file x")
    watch.stop()
    assert ended.value.code == 2
    assert json.loads(store.values["moi_jax/failed"])["line"] == "stopped: there is no file x"
    assert capfd.readouterr().err == ""
