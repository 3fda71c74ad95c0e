"""train() as a library function: many runs in one process, from any thread, without a command."""

import threading
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from moi_jax.common.errors import UserError

from support.runs import records, small_config, stop_after, train_here


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The directory with the data of this file's runs, which is prepared once."""
    return tmp_path_factory.mktemp("train")


def run(place, name, *overrides, **options):
    """Trains four steps in place/name, without evaluations."""
    config = small_config(
        place,
        train={"steps": 4, "global_batch_rows": 2},
        checkpoint={"every": 100},
        logging={"run_dir": str(place / name), "every": 1, "trackers": []},
    )
    return train_here(config, *overrides, make_evaluations=None, **options)


def test_the_result_describes_the_run(place):
    result = run(place, "result")
    assert (result.step, result.finished) == (4, True)
    assert result.directory == place / "result"
    assert result.checkpoint == place / "result" / "checkpoints" / "4"
    assert result.checkpoint.is_dir()
    assert result.report == place / "result" / "report.html"
    assert "<html" in result.report.read_text(encoding="utf-8")
    assert result.metrics == records(place / "result" / "metrics.jsonl")[-1]
    assert result.metrics["step"] == 4
    assert int(result.state.step) == 4


def test_deterministic_is_refused_where_its_flag_is_missing(place):
    """jax has started already, so a run in this process could not keep the promise."""
    with pytest.raises(UserError, match=r"needs XLA_FLAGS=--xla_gpu_deterministic_ops=true"):
        run(place, "deterministic", "train.deterministic=true")
    assert not (place / "deterministic").exists()


def test_runs_in_one_process_are_independent(place):
    first = run(place, "first")
    other = run(place, "other", "train.seed=1", "train.steps=2", "model.remat=full")
    again = run(place, "again")
    assert (first.step, other.step, again.step) == (4, 2, 4)
    assert other.metrics["loss"] != records(first.directory / "metrics.jsonl")[1]["loss"]
    for left, right in zip(
        records(first.directory / "metrics.jsonl"),
        records(again.directory / "metrics.jsonl"),
        strict=True,
    ):
        assert left["loss"] == right["loss"]
    jax.tree.map(np.testing.assert_array_equal, first.state.parameters, again.state.parameters)


def test_a_thread_that_is_not_the_main_one_trains(place):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(place, "thread")))
    thread.start()
    thread.join()
    assert [result.finished for result in results] == [True]


def test_stop_is_called_after_each_step_and_the_run_resumes_from_there(place):
    asked, entered = [], []

    @contextmanager
    def stop():
        entered.append("in")
        with stop_after(3) as should_stop:
            yield lambda: asked.append(should_stop()) or asked[-1]
        entered.append("out")

    stopped = run(place, "stopped", stop=stop())
    assert asked == [False, False, True]
    assert entered == ["in", "out"]
    assert (stopped.step, stopped.finished) == (3, False)
    assert stopped.checkpoint.name == "3"
    assert stopped.checkpoint.is_dir()
    assert stopped.metrics["step"] == 3
    # The directory is free again: the same call resumes the run.
    finished = run(place, "stopped")
    assert (finished.step, finished.finished) == (4, True)
    assert [r["step"] for r in records(finished.directory / "metrics.jsonl")] == [1, 2, 3, 4]


def test_nothing_is_printed(place, capfd):
    run(place, "silent")
    assert capfd.readouterr().out == ""
