"""Sets the trap of a case: Python imports this file when the process that is to be hurt starts.

    FAULT_TRAP={"event": "os.rename", "pattern": "checkpoints/10$", "signals": [9], ...}

The trap waits for one of Python's audit events (a file is opened, a folder renamed, a module
imported), or for a message of moi_jax's log ("event": "log"). Then it sends signals to its own
process, or fills a disk. The hurt program knows nothing of it, and a fault comes at the same place
in every campaign.
"""

import json
import logging
import os
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

AGAIN_SECONDS = 0.2  # between a signal and the next one


class Trap(logging.Handler):
    """Springs once, at the first event whose arguments match a pattern."""

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self._event = options["event"]
        self._pattern = re.compile(options["pattern"])
        self._after = options["after"]
        self._signals = options["signals"]
        self._fill = options["fill"]
        self._sprung_file = Path(options["sprung"])
        self._sprung = False

    def set(self) -> None:
        if self._event == "log":
            logging.getLogger("moi_jax").addHandler(self)
        else:
            sys.addaudithook(self._audit)

    def emit(self, record: logging.LogRecord) -> None:
        self._meet(record.getMessage())

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == self._event and not self._sprung:
            self._meet(" ".join(map(str, arguments[:2])))

    def _meet(self, text: str) -> None:
        if self._sprung or not self._pattern.search(text):
            return
        self._sprung = True
        if self._after:
            later = threading.Timer(self._after, self._spring)
            later.daemon = True
            later.start()
        else:
            self._spring()

    def _spring(self) -> None:
        self._sprung_file.touch()
        if self._fill:
            with suppress(OSError), open(self._fill, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
        for number, sent in enumerate(self._signals):
            time.sleep(AGAIN_SECONDS if number else 0)
            os.kill(os.getpid(), sent)


if "FAKETIME_TIMESTAMP_FILE" in os.environ:
    # libfaketime 0.9.10 refuses the absolute times with which time.sleep asks the system.
    time.sleep = lambda seconds: threading.Event().wait(seconds) and None

if "FAULT_TRAP" in os.environ:
    # Taken out of the environment: the trap is not for the process's children.
    Trap(json.loads(os.environ.pop("FAULT_TRAP"))).set()
