"""benchmarks/gpu.py with tiny sizes on the CPU: each part runs and leaves its file."""

import json
import subprocess
import sys

from support.runs import ENVIRONMENT, ROOT

PARTS = ("contract", "attention", "train", "largest", "greedy")


def test_every_part_runs_dry_and_leaves_its_file(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "all", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    reports = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
    assert {report["status"] for report in reports.values()} == {"done"}, reports
    found = {name: report["results"] for name, report in reports.items()}
    assert all(result["passed"] for result in found["contract"])
    assert [row.get("direction") for row in found["attention"]] == [
        None, "forward", "forward + backward",
    ]  # fmt: skip
    assert found["train"][0]["tokens"] == 2 * 128
    assert found["largest"][0]["fits"]
    assert [result["equal"] for result in found["greedy"]] == [True]
