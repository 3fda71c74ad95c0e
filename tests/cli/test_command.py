"""How a command ends: what it prints where, with which exit status, and what a signal does."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from support.processes import start
from support.runs import ENVIRONMENT as OURS
from support.runs import ROOT

ENVIRONMENT = {key: value for key, value in OURS.items() if key != "PYTHONUNBUFFERED"}

COMMAND = """
import logging, os, sys, threading, time
from pathlib import Path
from rich.table import Table
from moi_jax.cli.command import run_command
from moi_jax.common.errors import UserError
from moi_jax.common.log import LogTable, show_logs
log = logging.getLogger("moi_jax.test")
def main():
    show_logs()
    {}
run_command(main)
"""
ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]
STOPPED = "stopped by {}; to go on, give the same command again\n"


def program(work, *options):
    return [sys.executable, *options, "-c", COMMAND.format(work)]


def outcome(work, *options, environment=None, **streams):
    """Exit status, standard output and standard error of a command that does `work`."""
    done = subprocess.run(
        program(work, *options), text=True, cwd=ROOT, env={**ENVIRONMENT, **(environment or {})},
        check=False, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_while_modules_are_imported_shows_no_traceback(tmp_path):
    (tmp_path / "pydantic.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-m", "moi_jax.evaluate", "--help"], cwd=ROOT, text=True, check=False,
        capture_output=True, env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("environment", ASCII)
def test_every_character_is_shown_where_the_output_is_ascii(environment):
    work = (
        r"table = Table('caf\xe9'); table.add_row('\u4e16'); log.info(LogTable(table)); "
        r"log.warning('\u4e16'); print('\U0001f600'); raise UserError('\xe9')"
    )
    status, output, errors = outcome(work, environment=environment)
    assert status == 2
    assert errors == "error: \\xe9\n"
    assert "+---" in output
    for shown in (r"caf\xe9", r"| \u4e16", r"warning: \u4e16", r"\U0001f600"):
        assert shown in output


def test_arguments_are_utf8_whatever_the_locale_is():
    work = "from moi_jax.cli.arguments import text; print(ascii(text(sys.argv[1])))"
    done = subprocess.run(
        [*program(work), "é".encode()],
        capture_output=True, cwd=ROOT, env={**ENVIRONMENT, **ASCII[1]}, check=False,
    )  # fmt: skip
    assert done.stdout == b"'\\xe9'\n", done.stderr


def test_a_file_name_that_the_locale_cannot_write_is_one_line():
    status, _, errors = outcome(r"open('donn\xe9es')", environment=ASCII[1])
    assert status == 2
    assert errors.count("\n") == 1
    assert r"donn\xe9es" in errors
    assert "PYTHONUTF8=1" in errors


FULL = "error: cannot write standard output: no space left on the device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the full device")
@pytest.mark.parametrize("options", [[], ["-u"]])
@pytest.mark.parametrize(
    ("work", "status", "told"),
    [
        ("print('a')", 2, FULL),
        ("print('a' * 100_000); Path(sys.argv[1]).touch()", 2, FULL),
        ("raise UserError('b')", 2, "error: b\n"),
        ("pass", 0, ""),
    ],
)
def test_a_command_ends_in_one_line_where_its_output_is_full(work, status, told, options, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*program(work, *options), tmp_path / "later"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, told)
    assert not (tmp_path / "later").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the full device")
@pytest.mark.parametrize("options", [[], ["-u"]])
def test_work_goes_on_where_its_log_cannot_be_written(options):
    """Neither a warning nor a thousand lines stop it, and an exit status of its own stays."""
    work = (
        "[log.warning('x' * 100) for _ in range(1000)]; print('done', file=sys.stderr); return {}"
    )
    with open("/dev/full", "w") as full:
        assert outcome(work.format(0), *options, stdout=full)[::2] == (2, f"done\n{FULL}")
        assert outcome(work.format(143), *options, stdout=full)[::2] == (143, "done\n")
        assert outcome("raise UserError('b')", *options, stderr=full)[:2] == (2, "")
        assert outcome("raise UserError('b')", *options, stderr=full, stdout=full)[0] == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_the_machine_refuses_is_one_line(number):
    status, _, errors = outcome(f"raise OSError({number}, os.strerror({number}), 'some/file')")
    assert status == 2
    assert errors.startswith("error: some/file: ")
    assert errors.count("\n") == 1


# In the last one the main thread is away from Python, as in a compilation.
WORK = {
    "sleep": "time.sleep(60)",
    "callback": "import weakref\n    while True: weakref.ref({*()}, lambda _: time.sleep(0.01))",
    "compute": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_in_one_line(sent, work):
    process = start(
        program(f"print('begun', flush=True); {WORK[work]}"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (128 + sent, STOPPED.format(sent.name))


def test_a_signal_that_the_parent_ignores_stays_ignored():
    work = (
        "from moi_jax.cli.signals import StopSignals\n"
        "    with StopSignals(60).watching() as stopped:\n"
        "        os.kill(os.getpid(), 2); time.sleep(0.1); print(stopped())"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert outcome("os.kill(os.getpid(), 2); time.sleep(0.1); print(1)") == (0, "1\n", "")
        assert outcome(work) == (0, "False\n", "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_that_cannot_save_in_time_ends_with_its_grace():
    """Also while the main thread is away from Python, where no handler of it can run."""
    work = (
        "from moi_jax.cli.signals import StopSignals\n"
        "    with StopSignals(1).watching():\n"
        f"        print('begun', flush=True); {WORK['compute']}"
    )
    process = start(
        program(work),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (143, STOPPED.format("SIGTERM"))
    assert time.monotonic() - sent > 0.9


def test_a_process_that_tests_signal_heeds_sigint_even_where_they_ignore_it():
    """As they do in a script that runs `make test &`."""
    show = "import json, signal; print(json.dumps(int(signal.getsignal(2) == signal.SIG_IGN)))"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start([sys.executable, "-c", show], stdout=subprocess.PIPE)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert not json.loads(process.communicate(timeout=20)[0])
