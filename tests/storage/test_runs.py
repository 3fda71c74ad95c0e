"""Runs whose directory is in an object store: resumed on another machine, stopped, damaged."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import pytest

from moi_jax.checkpoints.items import find_step
from moi_jax.checkpoints.stored_steps import ASIDE
from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import LOST, Unreachable, UserError
from moi_jax.common.home import expand_home
from moi_jax.config.load import load_config
from moi_jax.storage.lease import Lease
from moi_jax.storage.store import Store
from moi_jax.training import stored_run

from support.object_stores import SECRET
from support.runs import (
    lasting,
    logged_steps,
    parameters,
    records,
    refusal,
    same_parameters,
    small_config,
    stop_after,
    train_here,
)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Looks for changes ten times a second, and takes a lease without a heartbeat soon."""
    monkeypatch.setattr(stored_run, "SEND_SECONDS", 0.1)
    monkeypatch.setattr(stored_run, "STALE_SECONDS", 3.0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Parameters and metrics of the same run in a local directory."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    run = train_here(small_config(directory), make_evaluations=None).directory
    return parameters(run), metrics(run)


def metrics(run: Path) -> list[dict]:
    return [lasting(record) for record in records(run / "metrics.jsonl")]


@pytest.fixture
def config(tmp_path):
    """Writes the config of a run that lies in a store under a name of its own."""

    def write(url: str, **sections) -> Path:
        return small_config(tmp_path, logging={"run_dir": url}, **sections)

    return write


def stored_steps(server, run: str) -> list[str]:
    names = server.names(f"{run}/checkpoints/")
    return sorted({n.split("/")[2] for n in names if n.endswith(SUMS)}, key=int)


def test_a_run_goes_on_exactly_on_a_fresh_machine(s3, config, machine, uninterrupted, log_text):
    """It stops after step 7; the newest of its checkpoints, 6 and 7, is damaged in the store.

    While it goes on, the store fails for a while.
    """
    run = config(s3.url("exact"))
    assert train_here(run, stop=stop_after(7), make_evaluations=None).step == 7
    assert stored_steps(s3, "exact") == ["6", "7"]
    damaged = next(n for n in s3.names("exact/checkpoints/7/parameters/") if "/d/" in n)
    content = s3.get(damaged)
    s3.put(damaged, content[:-1] + bytes([content[-1] ^ 1]))
    s3.put("exact/checkpoints/8/parameters/manifest.ocdbt", b"of an upload that was cut off")
    machine("second")
    result = train_here(run, stop=_closing(s3, after=2, seconds=4), make_evaluations=None)
    said = log_text.getvalue()
    assert "checkpoint 7 in s3://bucket/exact/checkpoints is damaged" in said
    assert f"renamed to {ASIDE}; the run goes on from step 6 and repeats 1" in said
    assert "checkpoint 8 in s3://bucket/exact/checkpoints was not sent to its end" in said
    assert "trying again for 60 s" in said
    assert SECRET not in said
    assert stored_steps(s3, "exact") == ["9", "10"]
    assert metrics(result.directory) == uninterrupted[1]
    for name in ("metrics.jsonl", "report.html", "config.yaml"):
        assert s3.get(f"exact/{name}") == (result.directory / name).read_bytes()
    assert b"run_dir: s3://bucket/exact\n" in s3.get("exact/config.yaml")
    # Who only reads it needs no local directory of the run.
    machine("third")
    same_parameters(parameters(s3.place("exact")), uninterrupted[0])
    assert find_step(s3.place("exact/checkpoints/9")).name == "9"


def test_a_run_ends_with_its_state_when_the_store_is_gone(s3, config, uninterrupted, log_text):
    run = config(s3.url("gone"), checkpoint={"every": 3, "retry_seconds": 1})
    with pytest.raises(Unreachable) as error:
        train_here(run, stop=_closing(s3, after=4), make_evaluations=None)
    assert error.value.exit_status == LOST
    assert "give the same command again when the store works" in str(error.value)
    assert logged_steps(expand_home(s3.place("gone")) / "metrics.jsonl")[-1] < 10
    result = train_here(run, "checkpoint.retry_seconds=60", make_evaluations=None)
    assert "resuming from step" in log_text.getvalue()
    assert "fetching" not in log_text.getvalue()  # the local copy is the newest
    assert stored_steps(s3, "gone") == ["9", "10"]
    assert metrics(result.directory) == uninterrupted[1]
    same_parameters(parameters(result.directory), uninterrupted[0])


@contextmanager
def _closing(server, after: int, seconds: float | None = None) -> Iterator[Callable[[], bool]]:
    """For `train(stop=...)`: the store is gone after a step, for seconds, or until the run ends."""
    with ExitStack() as closed:
        asked = count(1)

        def should_stop() -> bool:
            step = next(asked)
            if step == after:
                closed.enter_context(server.proxy.closed())
                if seconds:
                    threading.Timer(seconds, closed.close).start()
            if step > after and not seconds:
                time.sleep(3)  # longer than the store is tried again
            return False

        yield should_stop


def test_a_second_run_is_refused(s3, config, machine):
    lease = Lease(Store(s3.place("taken")), "another", 3.0)
    said = refusal(config(s3.url("taken")), make_evaluations=None)
    assert "s3://bucket/taken is in use by another run" in said
    lease.release()


def test_fresh_does_not_replace_a_run_in_a_store(s3, config):
    s3.put("old/config.yaml", b"")
    said = refusal(config(s3.url("old")), fresh=True)
    assert "which an object store cannot do; name another logging.run_dir" in said
    assert s3.names("old/") == ["old/config.yaml"]


def test_objects_that_are_no_run_are_left_alone(s3, config):
    s3.put("data/part-1.parquet", b"")
    said = refusal(config(s3.url("data")))
    assert "s3://bucket/data holds objects but is not a run directory" in said
    assert s3.names("data/") == ["data/part-1.parquet"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("s3://", "s3:// is no place in an object store; write s3://BUCKET/PATH"),
        ("gs://bucket/../other", "without '..'"),
        ("az://bucket/run", "az:// is no store that is supported; these are: gs:// and s3://"),
    ],
)
def test_a_url_that_names_no_place_is_refused(tmp_path, text, told):
    with pytest.raises(UserError) as error:
        load_config(small_config(tmp_path), [f"logging.run_dir={text}"])
    assert told in str(error.value)
    assert "logging.run_dir" in str(error.value)
