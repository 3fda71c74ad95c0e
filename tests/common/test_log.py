"""The log on the console: plain lines in a pipe, tables, warnings, and who shows what."""

import io
import logging
import re
import sys

import pytest
from rich.table import Table

from moi_jax.common.log import EVERY_HOST, LogTable, show_logs
from moi_jax.common.progress import count_bar

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
LONG = "a sentence that goes on " * 10 + "to its end"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """A logger below moi_jax, and a terminal of its own."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return logging.getLogger("moi_jax.some.room")


def show_on(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, **options: int) -> io.StringIO:
    """Shows the log on a standard output that a test can read."""
    # Not in a fixture: pytest changes standard output after it.
    monkeypatch.setattr(sys, "stdout", stream)
    show_logs(**options)
    return stream


def table(cell: str) -> LogTable:
    rows = Table("domain", "file", title="Sources")
    rows.add_row("code", cell)
    return LogTable(rows)


def test_a_line_in_a_pipe_is_the_message_unbroken(monkeypatch, log):
    pipe = show_on(io.StringIO(), monkeypatch)
    log.info(LONG)
    assert pipe.getvalue() == LONG + "\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_text_is_taken_literally(stream, monkeypatch, log):
    shown = show_on(stream(), monkeypatch)
    message = "[bold]chat.jsonl:100: 3 rows[/bold] in [0, 5)"
    log.info(message)
    assert shown.getvalue() == message + "\n"


def test_a_line_on_a_terminal_is_not_broken_by_us(monkeypatch, log):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = show_on(Terminal(), monkeypatch)
    log.info(LONG)
    assert terminal.getvalue() == LONG + "\n"


def test_a_table_in_a_pipe_keeps_every_cell_on_one_line_without_control_codes(monkeypatch, log):
    pipe = show_on(io.StringIO(), monkeypatch)
    name = "[part]/" + "a_long_folder/" * 12 + "rows:100:.jsonl"
    log.info(table(name))
    assert name in pipe.getvalue()
    assert not CONTROL.search(pipe.getvalue())


def test_a_table_on_a_terminal_fits_it_and_is_styled(monkeypatch, log):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = show_on(Terminal(), monkeypatch)
    log.info(table("a_long_folder/" * 12))
    shown = terminal.getvalue()
    assert "\x1b[" in shown
    assert all(len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= 40 for line in shown.splitlines())


def test_a_table_is_plain_text_for_other_handlers(log):
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.info(table("rows:100:.jsonl"))
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
    assert "rows:100:.jsonl" in text.getvalue()
    assert not CONTROL.search(text.getvalue())


def test_a_warning_says_so(monkeypatch, log):
    pipe = show_on(io.StringIO(), monkeypatch)
    log.warning("domain %s has %d rows", "code", 3)
    log.info("done")
    assert pipe.getvalue() == "warning: domain code has 3 rows\ndone\n"


def test_another_process_shows_only_what_concerns_every_host(monkeypatch, log):
    pipe = show_on(io.StringIO(), monkeypatch, process_index=lambda: 1)
    log.info("step 1")
    log.warning("domain code repeats rows")
    log.info("process 1 of 2", extra={EVERY_HOST: True})
    assert pipe.getvalue() == "process 1 of 2\n"


def test_a_second_call_prints_once_and_where_it_says(capsys, log):
    show_logs()
    show_logs(stderr=True)
    log.info("once")
    assert capsys.readouterr() == ("", "once\n")


def test_a_handler_of_the_root_logger_does_not_print_again(monkeypatch, log):
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger().addHandler(handler)
    pipe = show_on(io.StringIO(), monkeypatch)
    log.warning("once")
    logging.getLogger().removeHandler(handler)
    assert (pipe.getvalue(), text.getvalue()) == ("warning: once\n", "")


def test_a_reader_that_has_left_is_told_to_the_command(monkeypatch, log):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    show_on(Closed(), monkeypatch)
    with pytest.raises(BrokenPipeError):
        log.info("a line")


def bar_text(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with count_bar("answers", 3) as done:
        done(3)
    return stream.getvalue()


def test_a_progress_bar_is_drawn_on_a_terminal(monkeypatch):
    assert "answers" in bar_text(monkeypatch, Terminal())


def test_a_progress_bar_is_not_drawn_in_a_pipe_even_where_colour_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert bar_text(monkeypatch, io.StringIO()) == ""
