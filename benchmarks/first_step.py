"""Seconds to the first step of the quickstart, cold and with what an earlier run left in its cache.

    python benchmarks/first_step.py

A run counts from the start of its process until its first step is logged. Before that step it
evaluates, and answers the sample prompts. The first run has an empty cache: it prepares the data
and compiles everything. The second one finds both in the cache. Last: the seconds of `--help`.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, "-m", "moi_jax.train"]
PARTS = ("start", "evaluation", "compile", "step")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for name in ("cold", "with the cache"):
            seconds, record = first_step(Path(directory), name.replace(" ", "_"))
            parts = ", ".join(f"{part} {record[f'time/{part}']:.1f}" for part in PARTS)
            print(f"{name}: {seconds:.1f} s to the first step ({parts})")
    started = time.monotonic()
    subprocess.run([*TRAIN, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print(f"--help: {time.monotonic() - started:.2f} s")


def first_step(directory: Path, run: str) -> tuple[float, dict[str, Any]]:
    """Starts the quickstart, and stops it when its first step is logged, with that record."""
    command = [
        *TRAIN, "--config", "configs/quickstart.yaml", "logging.every=1", "logging.trackers=[]",
        f"logging.run_dir={directory / run}", f"data.cache_dir={directory / 'cache'}",
    ]  # fmt: skip
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            while (record := _step_record(directory / run / "metrics.jsonl")) is None:
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
                time.sleep(0.05)
            return time.monotonic() - started, record
        finally:
            process.terminate()


def _step_record(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return next((record for record in records if "learning_rate" in record), None)


if __name__ == "__main__":
    main()
