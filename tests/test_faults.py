"""The campaign of benchmarks/faults: two of its faults on runs of four steps, and its verdicts."""

import json
import subprocess
import sys

import pytest

from support.runs import ENVIRONMENT, ROOT

FAULTS = ROOT / "benchmarks" / "faults"
KILLED = "interruptions | before a checkpoint gets its name | SIGKILL"
FLIPPED = "newest checkpoint | parameters/ocdbt.process_0/d/* largest | a bit flipped"


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Plays two faults; returns the directory and the finished process."""
    out = tmp_path_factory.mktemp("campaign")
    pattern = "|".join(name.replace("|", r"\|").replace("*", r"\*") for name in (KILLED, FLIPPED))
    done = subprocess.run(
        [sys.executable, FAULTS, "--out", out, "--steps", "4", "--only", pattern],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    return out, done


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(FAULTS)


def test_a_kill_in_a_save_and_a_flipped_bit_end_exact(campaign):
    out, done = campaign
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {line["name"]: line["verdict"] for line in lines} == {KILLED: "exact", FLIPPED: "exact"}
    assert done.returncode == 0
    table = (out / "table.md").read_text()
    assert "| parameters/ocdbt.process_0/d/* largest | exact |" in table
    assert "| all | 2 | 2 | 0 | 0 | 0 |" in done.stdout


def test_every_file_of_a_checkpoint_and_of_the_cache_has_its_faults(campaign, modules):
    from damages import CACHE_FILES, CHECKPOINT_FILES

    whole = campaign[0] / "reference"
    step = whole / "run" / "checkpoints" / "3"
    covered = {path for file in CHECKPOINT_FILES for path in step.glob(file.split()[0])}
    assert {path for path in step.rglob("*") if path.is_file()} == covered
    for kind, folders in (("domain", "*"), ("block", "blocks/*")):
        files = {path.name for path in whole.glob(f"cache/{folders}/*") if path.is_file()}
        assert {f"{kind}/{name}" for name in files} <= set(CACHE_FILES)


class Place:
    """A place whose command, given again, ends with `status` and these results."""

    def __init__(self, results, status=0):
        self.results, self.status = lambda: results, status
        self.lab, self.reference = self, lambda: Place({"parameters": "right"})

    def train(self):
        from workplace import Done

        return Done(self.status, "", "", True)


RIGHT, OTHER = Place({"parameters": "right"}), Place({"parameters": "other"})


@pytest.mark.parametrize(
    ("place", "status", "stderr", "lost", "kind"),
    [
        (RIGHT, 0, "", [], "exact"),
        (OTHER, 0, "", [], "wrong"),
        (RIGHT, 2, "error: x is damaged\n", [], "named stop"),
        (RIGHT, 2, "warning: y\nerror: x is damaged\n", [], "named stop"),
        (OTHER, 2, "error: x is damaged\n", [], "wrong"),
        (Place({"parameters": "right"}, status=2), 2, "error: x is damaged\n", [], "wrong"),
        (RIGHT, 2, "error: x is damaged\n", ["checkpoints/5/position/metadata"], "wrong"),
        (RIGHT, 2, "error: x\nerror: y\n", [], "wrong"),
        (RIGHT, 2, "", [], "wrong"),
        (RIGHT, 2, "Traceback (most recent call last):\n", [], "wrong"),
        (RIGHT, 1, "error: x\n", [], "wrong"),
        (RIGHT, -11, "", [], "wrong"),
        (RIGHT, None, "", [], "wrong"),
    ],
)
def test_the_verdict_of_a_run_under_a_fault(modules, place, status, stderr, lost, kind):
    from verdicts import judge_run
    from workplace import Done

    done = Done(status, "", stderr, True, lost)
    assert judge_run(place, done, lambda: None).kind == kind


def test_a_fault_that_never_happened_proves_nothing(modules):
    from verdicts import judge_stop
    from workplace import Done

    assert judge_stop(RIGHT, Done(143, "", "", False), {143}).kind == "wrong"


NAMED = "error: process 0 (a) is lost: it gave no sign of life for 10 s\n"


@pytest.mark.parametrize(
    ("place", "statuses", "stderr", "kind"),
    [
        (RIGHT, (-9, 75), NAMED, "exact"),
        (OTHER, (-9, 75), NAMED, "wrong"),
        (RIGHT, (-9, 75), "error: something else\n", "wrong"),
        (RIGHT, (-9, 1), NAMED, "wrong"),
        (RIGHT, (-9, None), "", "wrong"),
        (RIGHT, (0, 75), NAMED, "wrong"),
        (Place({"parameters": "right"}, status=1), (-9, 75), NAMED, "wrong"),
    ],
)
def test_the_verdict_of_two_processes_of_which_one_is_killed(
    modules, place, statuses, stderr, kind
):
    from joined_verdicts import judge_joined
    from workplace import Done

    ended = [Done(status, "", stderr if status != -9 else "", True) for status in statuses]
    verdict = judge_joined(place, ended, [{-9}, {75}], "process 0 .* is lost")
    assert verdict.kind == kind


def test_the_faults_of_two_hosts_are_the_same_in_every_campaign(modules):
    from joined_cases import joined_cases
    from joined_copies import joined_copies

    names, again = ([case.name for case in joined_cases(20)] for _ in range(2))
    assert names == again
    assert len(names) == len(set(names)) == 48
    assert sum(name.startswith("killed") for name in names) == 20
    copies = [case.name for case in joined_copies(20)]
    assert len(copies) == len(set(copies)) == 7
    # The newest copy lies between the checkpoints of steps 10 and 15.
    assert {name.rpartition(" ")[2] for name in copies} == {"10", "12"}


@pytest.mark.parametrize("steps", range(4, 28, 4))
def test_a_run_with_faults_of_local_copies_has_a_copy_that_is_newer_than_its_checkpoint(
    modules, steps
):
    from joined_copies import joined_copies, newest_steps

    copied, saved = newest_steps(steps)
    assert bool(list(joined_copies(steps))) == (copied > saved)
