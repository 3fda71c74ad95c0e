"""Lines about the progress of long work in a file."""

import re
import threading

from moi_jax.common.progress_lines import _describe, progress_lines

PATIENCE = 60  # seconds, for a machine under load


def test_lines_come_while_the_work_is_away_and_say_how_far_it_is(tmp_path):
    path, state, seen = tmp_path / "progress.log", [3, 100], threading.Event()

    def look():
        if look.calls == 3:  # two calls for the first line, then two of the other thread
            seen.set()
        look.calls += 1
        return tuple(state)

    look.calls = 0
    with progress_lines(path, "gsm8k answers", 1_319, look, every=0.01):
        state[:] = 5, 700
        assert seen.wait(PATIENCE)
    lines = path.read_text().splitlines()
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d gsm8k answers: [35] of 1,319", line)
        for line in lines
    )
    assert "tokens/s, " in lines[-1]
    assert lines[-1].endswith(" to go")


def test_rate_and_rest_are_of_what_was_done_since_the_begin():
    # 10 of 90 parts and 600 tokens in 20 seconds: the other 80 parts take 160 seconds.
    told = _describe(100, (10, 1_000), (20, 1_600), 20.0)
    assert told == "20 of 100, 30 tokens/s, 0:02:40 to go"
    assert _describe(100, (0, 0), (0, 0), 5.0) == "0 of 100"
    assert _describe(100, (0, 0), (100, 0), 5.0) == "100 of 100"
    assert _describe(9, (0, 0), (1, 0), 1800.0).endswith("4:00:00 to go")


def test_a_line_that_cannot_be_written_does_not_stop_the_work(tmp_path):
    with progress_lines(tmp_path, "a directory", 1, lambda: (0, 0)):
        done = True
    assert done


def test_without_a_file_nothing_is_looked_at():
    with progress_lines(None, "", 1, lambda: 1 / 0):
        pass
