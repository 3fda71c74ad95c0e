"""Processes that a test starts and sends signals."""

import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def start(arguments: Sequence[Any], **options: Any) -> subprocess.Popen:
    """Starts a process that heeds SIGINT.

    A script that runs the tests in the background, `make test &`, starts them with SIGINT ignored,
    and their children would inherit that. A handler, however, becomes the default in a child.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(arguments, **options)
    finally:
        signal.signal(signal.SIGINT, before)
