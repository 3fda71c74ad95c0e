"""shellcheck finds nothing in the shell scripts."""

import os
import subprocess
import sys
from pathlib import Path

from support.runs import ROOT

SCRIPTS = sorted(
    path for pattern in ("*.sh", "*.sbatch") for path in (ROOT / "launch").rglob(pattern)
)


def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) >= 11
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
