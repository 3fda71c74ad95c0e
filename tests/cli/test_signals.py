"""A signal ends a process, which first tells the others that belong to it."""

import subprocess
import sys

from support.runs import ROOT

# Its telling takes longer than a main thread may be away before another thread ends the process.
SLOW_TO_TELL = """
import os, signal, time
from moi_jax.cli import signals

def tell_hosts(status, line):
    time.sleep(1.5 * signals.AWAY_SECONDS)
    print("told", status, flush=True)

signals.tell_hosts = tell_hosts
with signals.ending_on_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_process_ends_when_it_has_told_the_others_and_says_so_once():
    done = subprocess.run(
        [sys.executable, "-c", SLOW_TO_TELL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (143, "told 143\n")
    assert done.stderr == "stopped by SIGTERM; to go on, give the same command again\n"
