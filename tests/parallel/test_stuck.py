"""A process whose device does not come back ends by itself, and shows where it was."""

import subprocess
import sys

from support.runs import ENVIRONMENT, ROOT

# The first batch is in time. Python's main thread cannot be asked to leave the second one.
PROGRAM = """
import time
from moi_jax.parallel.stuck import limit_batches, limited_batch
with limited_batch():
    time.sleep(1.5)  # no command has asked for a limit
limit_batches(1)
with limited_batch():
    print("in time", flush=True)
time.sleep(1.5)  # between two batches, as in a judge of answers
print("between", flush=True)
with limited_batch():
    time.sleep(120)
"""


def test_a_batch_that_does_not_end_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 75
    assert done.stdout.splitlines() == ["in time", "between"]
    assert done.stderr.splitlines()[-1].startswith("error: stuck: no step, batch or save ended")
    assert 'File "<string>", line 12' in done.stderr
