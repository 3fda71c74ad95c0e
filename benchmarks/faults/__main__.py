"""A campaign of faults against training runs: python benchmarks/faults --out DIR

Plays each fault against a run of its own of python -m moi_jax.train: a tiny model on the sample
set, 20 steps, evaluated and saved every 5. With --hosts 2, two joined processes train it. Then the
campaign takes the fault back, gives the same command again, and compares the end with that of a run
that nothing hurt (see verdicts.py, joined_verdicts.py). Needs Linux; where mounts, other users or
network namespaces are not allowed, the faults that need them are skipped by name.

DIR/results.jsonl has a line for each fault. A fault that is there is not played again, so that a
campaign can be continued; a changed program needs a new DIR. DIR/table.md is the report. The exit
status is 1 if a fault went wrong. The figures are in docs/reliability.md.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cases import Case
from damages import damages
from disks import disks
from interruptions import interruptions
from joined_cases import joined_cases
from joined_copies import joined_copies
from joined_place import HOSTS, JoinedPlace, Missed
from stores import joined_stores, stores
from surroundings import surroundings
from table import report
from verdicts import SKIPPED, WRONG, Verdict
from workplace import Lab, Skip, Workplace


def all_cases(steps: int, hosts: int) -> list[Case]:
    if hosts > 1:
        return [*joined_cases(steps), *joined_stores(), *joined_copies(steps)]
    return [*interruptions(steps), *damages(), *disks(steps), *surroundings(steps), *stores()]


def play(number: int, case: Case, lab: Lab, keep: bool) -> dict[str, Any]:
    """Plays a case and returns its line of the results."""
    place = lab.place(f"cases/{number}")
    shutil.rmtree(place.directory, ignore_errors=True)
    begin = time.monotonic()
    try:
        verdict = case.play(place)
    except Skip as reason:
        verdict = Verdict(SKIPPED, str(reason))
    except Missed as reason:
        verdict = Verdict(WRONG, str(reason))
    if case.demands and verdict.kind not in (case.demands, WRONG, SKIPPED):
        verdict = Verdict(WRONG, f"{case.demands} is demanded, not {verdict.kind}; {verdict.seen}")
    if not keep:
        shutil.rmtree(place.directory, ignore_errors=True)
    seconds = round(time.monotonic() - begin, 1)
    return {"name": case.name, "verdict": verdict.kind, "seen": verdict.seen, "seconds": seconds}


def with_own_mounts() -> None:
    """Begins this program anew where it may mount file systems that nobody else sees."""
    if "FAULTS_MAY_MOUNT" in os.environ or not shutil.which("unshare"):
        return
    environment = {**os.environ, "FAULTS_MAY_MOUNT": "1"}
    for options in (["--mount"], ["--mount", "--map-root-user"]):
        tried = subprocess.run(["unshare", *options, "true"], capture_output=True, check=False)
        if not tried.returncode:
            os.execvpe("unshare", ["unshare", *options, sys.executable, *sys.argv], environment)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["name"]: line for line in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), metavar="DIR")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression")
    parser.add_argument("--list", action="store_true", help="print the names of the faults")
    parser.add_argument("--jobs", type=int, default=1, help="faults that are played at once")
    parser.add_argument(
        "--hosts", type=int, default=1, choices=(1, HOSTS), help="processes of a run"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="of a run, a multiple of 4; local copies need 16"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a command")
    parser.add_argument("--keep", action="store_true", help="keep the directories of the cases")
    args = parser.parse_args()
    cases = [case for case in all_cases(args.steps, args.hosts) if re.search(args.only, case.name)]
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    with_own_mounts()
    # The commands get it as from a shell, also where the campaign runs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind = Workplace if args.hosts == 1 else JoinedPlace
    lab = Lab(args.out, args.steps, args.timeout, kind)
    lab.prepare()
    path = args.out / "results.jsonl"
    results = read_results(path)
    left = [(number, case) for number, case in enumerate(cases) if case.name not in results]
    with ThreadPoolExecutor(args.jobs) as pool, path.open("a", encoding="utf-8") as file:
        futures = [pool.submit(play, number, case, lab, args.keep) for number, case in left]
        for future in as_completed(futures):
            line = future.result()
            results[line["name"]] = line
            print(json.dumps(line), file=file, flush=True)
            print(
                f"[{len(results)}] {line['name']}: {line['verdict']} ({line['seconds']} s) "
                f"{line['seen']}", flush=True,
            )  # fmt: skip
    kinds = {name: line["verdict"] for name, line in results.items()}
    text = report(all_cases(args.steps, args.hosts), kinds)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text.split("\n\n")[0])
    return int(any(kinds[case.name] == WRONG for case in cases))


if __name__ == "__main__":
    sys.exit(main())
