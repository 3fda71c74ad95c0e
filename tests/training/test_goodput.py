"""Where the time of a run went: the clock alone, and the records of runs that were interrupted."""

import json
from datetime import UTC, datetime, timedelta

import jax
import numpy as np
import pytest

from moi_jax.training.goodput import PARTS, Clock
from moi_jax.training.metrics import MetricsLog

from support.runs import lasting, records, small_config, stop_after, train_here

TRACE = "/jax/core/compile/jaxpr_trace_duration"
COMPILE = "/jax/core/compile/backend_compile_duration"


class Time:
    """A clock that a test turns on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def time():
    return Time()


def sums(record):
    """Part -> seconds, without the parts that took no time."""
    seconds = {part: record[f"time/{part}"] for part in PARTS}
    return {part: took for part, took in seconds.items() if took}


def test_every_second_counts_for_the_innermost_part(time):
    clock = Clock(time)
    time.now += 5
    with clock.part("step"):
        time.now += 30
        with clock.part("data_wait"):
            time.now += 2
        with clock.part("evaluation"):
            time.now += 1
            with clock.part("checkpoint"):
                time.now += 4
        time.now += 8
    record = clock.record()
    assert sums(record) == {
        "start": 5, "step": 38, "data_wait": 2, "evaluation": 1, "checkpoint": 4,
    }  # fmt: skip
    assert record["goodput"] == 38 / 50


def test_compiling_counts_once_and_not_for_its_part(time):
    clock = Clock(time)
    with clock.part("step"):
        time.now += 10
        clock.on_event(TRACE, 2.0)  # within the next one
        time.now += 1
        clock.on_event(TRACE, 4.0)
        time.now += 6
        clock.on_event(COMPILE, 5.0)
        clock.on_event("/jax/another/event", 5.0)
    assert sums(clock.record()) == {"compile": 9, "step": 8}


@pytest.mark.parametrize(("duration", "compiled"), [(3600.0, 3), (-3600.0, 0)])
def test_a_wall_clock_that_jumps_while_jax_compiles_adds_no_time(time, duration, compiled):
    clock = Clock(time)
    with clock.part("step"):
        time.now += 3
        clock.on_event(COMPILE, duration)
    assert sum(sums(clock.record()).values()) == 3
    assert clock.seconds["compile"] == compiled


def test_a_program_that_jax_compiles_is_noticed():
    with Clock().running() as clock, clock.part("step"):
        jax.jit(lambda x: x * 7 + 1)(np.ones(3))
    assert clock.record()["time/compile"] > 0


def written(step, ago, /, **seconds):
    """A record of an earlier process."""
    at = datetime.now(UTC) - timedelta(seconds=ago)
    times = {f"time/{part}": seconds.get(part, 0.0) for part in PARTS}
    return {"step": step, **times, "written": at.isoformat()}


def test_a_restart_counts_what_is_repeated_and_how_long_the_run_was_down(tmp_path, time):
    """Killed after step 9 and resumed from step 5; then killed again before its first record."""
    lines = [
        written(5, 300, start=10, compile=20, step=50),
        written(9, 200, start=10, compile=20, step=90, evaluation=6),
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        clock = Clock(time)
        time.now += 7
        MetricsLog(tmp_path, [], 5, clock)
        [kept] = records(log)
        found = sums(kept)
        assert found.pop("down") == pytest.approx(200 - 7, abs=2)
        assert found == {"start": 17, "compile": 20, "step": 50, "lost": 46}


def test_a_run_that_begins_anew_has_lost_all_it_did(tmp_path, time):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(written(2, 60, step=40, down=5)) + "\n")
    clock = Clock(time)
    MetricsLog(tmp_path, [], -1, clock)
    found = sums(clock.record())
    assert found.pop("down") == pytest.approx(65, abs=2)
    assert found == {"lost": 40}


def test_the_records_of_an_interrupted_run_account_for_all_its_time(tmp_path):
    """It stops at step 4 and resumes; it resumes again from step 3, when step 4 has vanished."""
    config = small_config(tmp_path, train={"steps": 6}, checkpoint={"every": 3, "keep_last": 3})
    began = datetime.now(UTC)
    train_here(config, make_evaluations=None, stop=stop_after(4))
    first = records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in first] == [1, 2, 3, 4]
    (tmp_path / "run" / "checkpoints" / "4").rename(tmp_path / "vanished")
    done = train_here(config, make_evaluations=None)
    log = records(done.directory / "metrics.jsonl")
    assert [lasting(record) for record in log[:4]] == [lasting(record) for record in first]
    whole = [sum(sums(record).values()) for record in log]
    assert whole == sorted(whole)
    for record, seconds in zip(log, whole, strict=True):
        elapsed = (datetime.fromisoformat(record["written"]) - began).total_seconds()
        assert seconds == pytest.approx(elapsed, abs=0.5)
    last = sums(log[-1])
    assert {"start", "step", "compile", "data_wait", "checkpoint", "lost", "down"} <= last.keys()
    since_3 = sum(sums(first[3]).values()) - sum(sums(first[2]).values())
    assert last["lost"] == pytest.approx(since_3, abs=0.01)
    assert log[-1]["goodput"] == pytest.approx(last["step"] / whole[-1], abs=0.001)
