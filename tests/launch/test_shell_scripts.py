"""shellcheck finds nothing in the shell scripts."""

import os
import subprocess
import sys
from pathlib import Path

from support.runs import ROOT

SCRIPTS = [
    path
    for pattern in ("launch/**/*.sh", "launch/**/*.sbatch", "tests/launch/*.sh", ".ci/run")
    for path in sorted(ROOT.glob(pattern))
]


def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) >= 13
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
