"""The local copy of a run in a store: when it is fetched, kept, and no longer sent."""

import json
import shutil
from contextlib import contextmanager

import pytest

from moi_jax.checkpoints.stored_steps import StoredSteps
from moi_jax.common.checksums import SUMS, write_sums
from moi_jax.common.errors import Unreachable, UserError
from moi_jax.common.home import expand_home
from moi_jax.config.load import load_config
from moi_jax.storage.lease import LEASE
from moi_jax.storage.store import Store
from moi_jax.training import stored_run as stored_run_lib
from moi_jax.training import train as train_lib
from moi_jax.training.run_directory import run_directory

from support.runs import small_config


@pytest.fixture(autouse=True)
def asked_only(monkeypatch):
    """The thread sends nothing by itself."""
    monkeypatch.setattr(stored_run_lib, "SEND_SECONDS", 600)


@pytest.fixture
def run(s3, request, tmp_path):
    """The name of a run, and a function that opens it, calls `work(run, directory)`, ends it."""
    name = f"copy/{request.node.name}"

    def work_in(work, retry_seconds=60):
        config = load_config(
            small_config(
                tmp_path,
                logging={"run_dir": s3.url(name)},
                checkpoint={"retry_seconds": retry_seconds},
            )
        )
        with (
            run_directory(config.logging.run_dir, False) as directory,
            stored_run_lib.stored_run(config, directory, False, False) as run,
        ):
            return work(run, directory)

    return name, work_in


def write_step(directory, number: int, values: str = "values", files: int = 1) -> None:
    step = directory / "checkpoints" / str(number)
    step.mkdir(parents=True)
    for file in range(files):
        (step / f"f{file}").write_text(values)
    write_sums(step, [f"f{file}" for file in range(files)])


def save(number: int, values: str = "values"):
    """The work of a run that saves one step."""

    def work(_, directory):
        (directory / "config.yaml").write_text("")
        write_step(directory, number, values)

    return work


def local_steps(_, directory) -> dict[str, str]:
    return {
        step.name: (step / "f0").read_text() for step in (directory / "checkpoints").glob("[0-9]*")
    }


def stored_steps(server, name: str) -> list[str]:
    return sorted(n.split("/")[-2] for n in server.names(f"{name}/checkpoints") if SUMS in n)


def test_a_local_copy_that_was_emptied_is_fetched(run, s3):
    name, work_in = run
    work_in(save(2))
    shutil.rmtree(expand_home(s3.place(name)) / "checkpoints")
    assert work_in(local_steps) == {"2": "values"}
    assert stored_steps(s3, name) == ["2"]


def test_a_local_copy_with_newer_steps_is_kept(run, s3):
    name, work_in = run
    work_in(save(2))
    write_step(expand_home(s3.place(name)), 4, "newer")
    assert work_in(local_steps) == {"2": "values", "4": "newer"}
    assert stored_steps(s3, name) == ["2", "4"]


def test_steps_that_the_store_has_not_are_moved_aside(run, s3, log_text):
    name, work_in = run
    work_in(save(2))
    for each in s3.names(f"{name}/"):
        s3.delete(each)
    assert work_in(local_steps) == {}
    directory = expand_home(s3.place(name))
    (aside,) = directory.parent.glob(f"{directory.name}.*")
    assert (aside / "checkpoints" / "2" / "f0").read_text() == "values"
    assert f"it is moved to {aside}, and the run goes on from what the store" in log_text.getvalue()


def test_a_local_copy_stays_where_the_store_has_nothing_sound(run, s3):
    name, work_in = run
    work_in(save(2))
    s3.put(f"{name}/checkpoints/2/f0", b"others")
    s3.put(f"{name}/{LEASE}", json.dumps({"owner": "other", "released": True}).encode())
    with pytest.raises(UserError, match="no sound checkpoint is left in s3://"):
        work_in(local_steps)
    assert local_steps(None, expand_home(s3.place(name))) == {"2": "values"}
    assert not list(expand_home(s3.place(name)).parent.glob(".*fetched"))
    s3.put(f"{name}/checkpoints/2/f0", b"values")
    # Newer, but of a copy that was not the last one to write.
    write_step(expand_home(s3.place(name)), 4)
    assert work_in(local_steps) == {"2": "values"}


def test_a_copy_whose_fetch_was_cut_off_is_fetched_again(run, s3, monkeypatch):
    name, work_in = run
    work_in(save(2))
    write_step(expand_home(s3.place(name)), 4)
    s3.put(f"{name}/{LEASE}", json.dumps({"owner": "other", "released": True}).encode())
    monkeypatch.setattr(stored_run_lib, "STALE_SECONDS", 1)
    with monkeypatch.context() as gone:
        gone.setattr(StoredSteps, "fetch", _unreachable)
        with pytest.raises(Unreachable):
            work_in(local_steps)
    assert work_in(local_steps) == {"2": "values"}


def _unreachable(*_):
    raise Unreachable("gone")


def test_a_first_checkpoint_that_was_cut_off_is_sent_by_the_machine_that_has_it(run, s3, machine):
    name, work_in = run
    work_in(save(2))
    s3.delete(f"{name}/checkpoints/2/{SUMS}")
    machine("second")
    with pytest.raises(UserError, match="go on where the run was written"):
        work_in(local_steps)
    machine("first")
    assert work_in(local_steps) == {"2": "values"}
    assert stored_steps(s3, name) == ["2"]


def test_nothing_is_sent_after_the_lease_was_lost(run, s3, monkeypatch):
    name, work_in = run
    written, write = [], Store.write

    def work(run, directory):
        def write_until_lost(store, file, content):
            write(store, file, content)
            written.append(file)
            if len(written) == 5:
                run._lease._failure = UserError("another run has taken over")

        monkeypatch.setattr(Store, "write", write_until_lost)
        (directory / "config.yaml").write_text("")
        write_step(directory, 2, files=30)

    with pytest.raises(UserError, match="has taken over"):
        work_in(work)
    assert len(written) < 5 + 4  # four files are sent at once
    assert stored_steps(s3, name) == []


def test_a_store_that_is_gone_is_waited_for_once(run, s3, monkeypatch):
    """After the first call that gave up, none is tried again."""
    _, work_in = run
    tried, send = [], stored_run_lib.StoredRun._send
    monkeypatch.setattr(
        stored_run_lib.StoredRun, "_send", lambda run: (tried.append(run), send(run))
    )

    def work(run, directory):
        (directory / "config.yaml").write_text("")
        with s3.proxy.closed():
            with pytest.raises(Unreachable):
                run.send()
            run.send()

    with pytest.raises(Unreachable):
        work_in(work, retry_seconds=0)
    assert len(tried) == 1


def test_a_long_upload_is_not_taken_for_a_run_that_is_stuck(monkeypatch):
    done = []

    @contextmanager
    def watching(seconds, should_stop):
        done.append(f"watched for {seconds} s")
        yield should_stop
        done.append("not watched")

    class Parts(stored_run_lib.LocalRun):
        def wait(self):
            done.append("saved")

        def send(self):
            done.append("sent")

    monkeypatch.setattr(train_lib, "ending_when_stuck", watching)
    monkeypatch.setattr(train_lib, "fit", lambda run, should_stop: done.append("trained"))
    train_lib._fit(None, Parts(), Parts(), lambda: False, 9)
    assert done == ["watched for 9 s", "trained", "saved", "not watched", "sent"]
