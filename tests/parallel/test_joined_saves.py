"""Two processes save a checkpoint, and one of them cannot write its part."""

import platform

from support.hosts import run_hosts


def saved(directory, failing, passes):
    act = f"save:{directory}:{failing}:{passes}"
    return run_hosts(2, 1, ["tests.support.host_program", act], timeout=200)


def test_all_processes_save_again_when_one_could_not_and_leave_the_newest_whole(tmp_path):
    outputs, statuses = saved(tmp_path / "run", 1, "passes")
    assert statuses == [0, 0], outputs
    said = outputs[0][0]
    assert f"warning: process 1 ({platform.node()}) cannot save checkpoint 2 in {tmp_path}" in said
    assert "checkpoint 1 is whole; saving step" in said
    # Both have noticed it at the same step, and the values are those of this step.
    (whole,) = {next(x for x in out.splitlines() if x.startswith("whole")) for out, _ in outputs}
    step = whole.split()[-1]
    assert whole == f"whole {step} 1 at step {step}"
    assert int(step) > 2
    assert all(f"holds {{{step}.0}}\n" in out for out, _ in outputs)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(["1", step])


def test_processes_stop_and_name_the_one_that_cannot_save(tmp_path):
    outputs, statuses = saved(tmp_path / "run", 0, "never")
    assert statuses == [2, 2], outputs
    assert outputs[0][0].count("warning:") == 2
    assert all(error for _, error in outputs)  # each finds it out itself, or hears it
    cause = f"process 0 ({platform.node()}) cannot save checkpoint "
    for line in (line for _, error in outputs for line in error.splitlines()):
        assert line.startswith("error: ")
        assert cause in line
        assert "File too large; checkpoint 1 is whole. Give the same command again" in line
    assert [path.name for path in (tmp_path / "run").glob("[0-9]") if path.is_dir()] == ["1"]
