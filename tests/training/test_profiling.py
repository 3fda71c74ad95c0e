"""Profiles of a run: the trace files exist and hold the steps of train.profile_steps."""

import jax

from moi_jax.training.profiling import StepProfiler

from support.runs import small_config, train_command


def traced_steps(directory):
    """Returns the step numbers in each trace below a profile directory, the oldest trace first."""
    found = []
    for path in sorted(directory.glob("plugins/profile/*/*.xplane.pb")):
        events = [
            dict(event.stats)
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            for line in plane.lines
            for event in line.events
            if event.name == "train"
        ]
        found.append(sorted({stats["step_num"] for stats in events}))
    return found


def test_the_steps_are_traced_also_when_the_run_stops_or_resumes_among_them(tmp_path):
    """In processes of their own: a trace ends a process that has loaded libtpu for another test."""
    config = small_config(tmp_path, train={"steps": 6, "profile_steps": [2, 5]})
    first = train_command(config, "train.steps=3")
    second = train_command(config, "--allow-change")
    assert traced_steps(tmp_path / "run" / "profile") == [[2, 3], [4, 5]]
    assert "profiled steps 2 to 3 in" in first.stdout
    assert "profiled steps 4 to 5 in" in second.stdout


def test_steps_past_the_end_of_the_run_give_a_warning(tmp_path, log_text):
    assert not StepProfiler((9, 12), 8, tmp_path).starts_before(8)
    assert "begins with step 9, but the run ends with step 8" in log_text.getvalue()
