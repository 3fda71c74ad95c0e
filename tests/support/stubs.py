"""Programs that stand for others in tests of shell scripts: they record how they are called."""

import os
import subprocess
from pathlib import Path

from support.runs import ROOT

STUB = """#!/usr/bin/env bash
{{ printf '%s\\0' "$(basename "$0")" "$@"; printf '\\x1e'; }} >>"{calls}"
{body}
"""


class Stubs:
    """Stubs in a directory that a script finds first in its PATH."""

    def __init__(self, directory: Path):
        self._calls = directory / "calls"
        self._bin = directory / "bin"
        self._bin.mkdir()

    def add(self, name: str, body: str = "") -> Path:
        """Adds a program that records its arguments and then does `body`, in bash."""
        path = self._bin / name
        path.write_text(STUB.format(calls=self._calls, body=body), encoding="utf-8")
        path.chmod(0o755)
        return path

    def environment(self, **variables: str) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self._bin}:{os.environ['PATH']}", **variables}

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Runs a script of launch/, or one with an absolute path, with the stubs."""
        return subprocess.run(
            [ROOT / "launch" / script, *arguments],
            capture_output=True, text=True, check=False,
            cwd=ROOT, env=self.environment(**variables),
        )  # fmt: skip

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of a program."""
        if not self._calls.exists():
            return []
        calls = [call.split("\0")[:-1] for call in self._calls.read_text().split("\x1e")[:-1]]
        return [arguments for called, *arguments in calls if called == name]
