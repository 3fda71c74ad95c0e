"""python -m moi_jax.audit on a good run, and on copies in which something was altered."""

import dataclasses
import json
import os
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import filelock
import jax
import numpy as np
import pytest
import tensorstore

import moi_jax.audit
from moi_jax.checkpoints.checksums import write_checksums
from moi_jax.checkpoints.damage import DamagedCheckpoint
from moi_jax.checkpoints.damaged_steps import check_step
from moi_jax.common import deterministic
from moi_jax.common.errors import UserError
from moi_jax.models.attention.xla import xla_attention
from moi_jax.models.compute import Compute
from moi_jax.models.decoder import make_model
from moi_jax.training.audit.audit import AuditResult
from moi_jax.training.audit.finding import FAILED, NOT_DONE, OK, Finding, NotDone, make_check
from moi_jax.training.audit.inputs import (
    check_cache,
    check_config,
    check_plan,
    check_sources,
    check_versions,
)
from moi_jax.training.audit.records import check_metrics, check_mixture
from moi_jax.training.audit.replay import check_replay
from moi_jax.training.audit.row_figures import RowFigures
from moi_jax.training.audit.saved_run import (
    PlannedRun,
    SavedRun,
    check_checkpoints,
    open_run,
    read_files,
)
from moi_jax.training.audit.segments import check_segments
from moi_jax.training.audit.signed import sign, write_signed
from moi_jax.training.audit.stretch import Replayed, Stretch, choose_stretch, replay
from moi_jax.training.run_directory import LOCK

from support.runs import SAMPLES, records, small_config, stop_after, train_here

METRICS = "metrics.jsonl"
CHECKS = (
    "checkpoints", "values", "config", "versions", "sources", "cache", "content", "plan",
    "mixture", "metrics", "mix", "held-out", "segments", "replay",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of 6 steps with the checkpoints 3 and 6, which no test changes.

    Each instruction is a segment, so that a short row has several. The programs are those of other
    tests' runs.
    """
    directory = tmp_path_factory.mktemp("whole")
    config = small_config(
        directory,
        loss={"normalization": "domain"},
        train={"steps": 6, "global_batch_rows": 2},
        eval={"every": 3},
        logging={"run_dir": str(directory / "run"), "every": 2, "trackers": []},
    )
    return train_here(config, "data.mask=instruction").directory


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it; its cache is the one of the original."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["audit", *map(str, arguments)])
    return moi_jax.audit.main()


def verdicts(file: Path) -> dict[str, tuple[str, str]]:
    """Check -> its verdict and text."""
    checks = json.loads(file.read_text(encoding="utf-8"))["checks"]
    return {check["name"]: (check["verdict"], check["text"]) for check in checks}


def opened(run: Path, *overrides: str) -> SavedRun:
    return open_run(run, check_checkpoints(run).value, jax.devices()[:1], overrides)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_parameter(step: Path, to: float | None = None) -> None:
    """Changes one value of a checkpoint, by default to the next larger one."""
    kvstore = {"driver": "ocdbt", "base": f"file://{step}/parameters/", "path": "final_norm.scale/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
    value = np.nextafter(array[7].read().result(), np.float32(9)) if to is None else np.float32(to)
    array[7].write(value).result()


def change_record(run: Path, step: int, key: str, change=lambda value: value + 1e-3) -> None:
    """Changes one figure of metrics.jsonl."""
    log = records(run / "metrics.jsonl")
    record = next(record for record in log if record["step"] == step)
    record[key] = change(record[key])
    text = "".join(json.dumps(record) + "\n" for record in log)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")


def contents(run: Path) -> dict[str, bytes]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(p.relative_to(run)): p.read_bytes() for p in files if p.parent.name != "audit"}


def test_a_good_run_passes_while_it_is_in_use_and_is_left_as_it_is(whole, monkeypatch, capsys):
    before = contents(whole)
    with filelock.FileLock(whole / LOCK):
        assert command(monkeypatch, whole, "--rows", 6) == 0
    assert contents(whole) == before
    found = verdicts(whole / "audit" / "audit.json")
    assert tuple(found) == CHECKS
    assert {verdict for verdict, _ in found.values()} == {OK}
    said = capsys.readouterr().out
    assert all(f"ok        {name:11}  {found[name][1]}\n" in said for name in CHECKS)
    assert "3 steps from checkpoint 3 give the parameters and the optimizer of checkpoint 6" in said
    assert "bit for bit" in found["replay"][1]
    # The oracle of the mix: balanced sampling, so each domain has one conversation in every chunk.
    figures = json.loads((whole / "audit" / "audit.json").read_text())["checks"][10]["figures"]
    assert figures["planned"]["chat"] == figures["planned"]["maths"] >= 12
    page = (whole / "audit" / "audit.html").read_text(encoding="utf-8")
    assert all(f'<th scope="row">{name}</th>' in page for name in CHECKS)
    assert not re.search(r"https?://|<script|<link|@import", page)


def test_an_altered_audit_is_noticed(tmp_path, monkeypatch, capsys):
    file = tmp_path / "audit.json"
    content = sign({"run": "runs/moi", "date": "2026", "verdict": "ok", "files": {"a": "ä"}})
    write_signed(file, content)
    assert command(monkeypatch, "--check", file) == 0
    file.write_text(json.dumps(dict(sorted(content.items()))))  # another layout, the same content
    assert command(monkeypatch, "--check", file) == 0
    assert capsys.readouterr().out.count("is as it was written: runs/moi, 2026, ok\n") == 2
    file.write_text(json.dumps({**content, "verdict": "FAILED"}))
    assert command(monkeypatch, "--check", file) == 1
    assert "has changed" in capsys.readouterr().out
    file.write_text("{}")
    with pytest.raises(UserError, match=r"is no audit\.json"):
        command(monkeypatch, "--check", file)


def test_alterations_that_checksums_do_not_tell_are_found_and_named(run, tmp_path, monkeypatch):
    """A data source, a figure of each record, and a parameter whose checksums were rewritten."""
    shutil.copytree(SAMPLES, tmp_path / "data")
    flip(tmp_path / "data" / "maths.jsonl")
    change_record(run, 2, "domain/maths/loss")
    mixture = run / "mixture.json"
    mixture.write_text(mixture.read_text().replace('"rows": ', '"rows": 1', 1))
    change_parameter(run / "checkpoints" / "6")
    write_checksums(run / "checkpoints" / "6")
    assert command(monkeypatch, run, f"data.root={tmp_path / 'data'}", "--rows", 2) == 1
    found = verdicts(run / "audit" / "audit.json")
    failed = {name for name, (verdict, _) in found.items() if verdict == FAILED}
    assert failed == {"sources", "mixture", "metrics", "replay"}
    assert "maths.jsonl, a source of domain maths, has changed" in found["sources"][1]
    assert re.match(r"mixture\.json: rows is 1\d+, and the plan has \d+; ", found["mixture"][1])
    assert "metrics.jsonl, step 2: token_loss is" in found["metrics"][1]
    assert (
        "3 steps from checkpoint 3 do not give checkpoint 6: parameters/final_norm.scale differs "
        "at 1 of 64 values, first at [7]"
    ) in found["replay"][1]


def test_alterations_that_checksums_tell_are_found_and_named(run, tmp_path, monkeypatch):
    """A parameter and a block of the cache; what is based on the cache is not done."""
    cache = tmp_path / "cache"
    shutil.copytree(opened(run).config.data.cache_dir, cache)
    block = min((cache / "blocks").glob("*/instructions.array_record"))
    flip(block)
    change_parameter(run / "checkpoints" / "6")
    assert command(monkeypatch, run, f"data.cache_dir={cache}", "--out", tmp_path / "out") == 1
    found = verdicts(tmp_path / "out" / "audit.json")
    assert found["checkpoints"][0] == found["cache"][0] == FAILED
    assert re.search(r"checkpoints/6 is damaged .*parameters/", found["checkpoints"][1])
    assert str(block.parent) in found["cache"][1]
    not_done = {name for name, (verdict, _) in found.items() if verdict == NOT_DONE}
    assert not_done == set(CHECKS[CHECKS.index("content") :])
    assert flip(block) is None  # mended: the cache itself is as it was
    assert make_check(check_cache, opened(run, f"data.cache_dir={cache}")).verdict == OK


@pytest.fixture(scope="module")
def planned(whole) -> tuple[SavedRun, PlannedRun, RowFigures]:
    """The run opened, with its data and the figures of its rows."""
    saved = opened(whole)
    data = check_cache(saved).value
    return saved, data, check_plan(saved, data).value


@pytest.fixture
def recorded(planned, tmp_path) -> tuple[SavedRun, PlannedRun, RowFigures]:
    """The same with a copy of its records."""
    saved, *rest = planned
    for name in ("config.yaml", "mixture.json", METRICS):
        shutil.copy(saved.directory / name, tmp_path)
    return read_again(dataclasses.replace(saved, directory=tmp_path)), *rest


def read_again(saved: SavedRun) -> SavedRun:
    return dataclasses.replace(saved, records=read_files(saved.directory))


@pytest.mark.parametrize(
    ("step", "key", "named"),
    [
        (4, "loss", "loss"),
        (6, "token_loss", "token_loss"),
        (3, "domain/chat/loss", "token_loss"),
        (2, "fill", "fill"),
        (4, "learning_rate", "learning_rate"),
        (4, "epoch", "epoch"),
        (2, "row", "row"),
        (6, "tokens_per_second", "tokens_per_second"),
        (3, "eval/chat/loss", "eval/mean/loss"),
    ],
)
def test_each_recorded_figure_is_recomputed(recorded, step, key, named):
    saved, *rest = recorded
    assert make_check(check_metrics, saved, *rest).verdict == OK
    change_record(saved.directory, step, key, lambda value: value * 1.001 if value else 1)
    found = make_check(check_metrics, read_again(saved), *rest)
    assert found.verdict == FAILED
    assert re.match(rf"metrics\.jsonl, step {step}: .*{named}", found.text)


def test_a_record_that_was_taken_out_is_missed(recorded):
    saved, *rest = recorded
    log = saved.directory / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if not line.startswith('{"step": 2,')))
    found = make_check(check_metrics, read_again(saved), *rest)
    assert found.verdict == FAILED
    assert "nothing between the steps 0 and 3" in found.text


@pytest.mark.parametrize(
    ("step", "values"),
    [
        (2, {"row": "x"}),
        (2, {"row": 10**13}),
        (4, {"skipped": True}),
        (4, {"skipped": True, "first_row": -1}),
        (4, {"skipped": True, "first_row": 0}),
        (4, {"loss": "0.5"}),
        (3, {"domain/chat/loss": [1]}),
        (3, {"eval/chat/loss": {}}),
        (6, {"loss": float("nan")}),
        (6, {"token_loss": 10**400}),
        (2, {"step": True}),
        (2, {"step": 1}),
    ],
)
def test_a_value_that_no_run_writes_is_named(recorded, step, values):
    saved, *rest = recorded
    log = records(saved.directory / "metrics.jsonl")
    next(record for record in log if record["step"] == step).update(values)
    text = "".join(json.dumps(record) + "\n" for record in log)
    saved.records["metrics.jsonl"] = text.encode()
    found = make_check(check_metrics, saved, *rest)
    assert found.verdict == FAILED
    assert found.text.startswith("metrics.jsonl, ")


@pytest.mark.parametrize(
    ("check", "name"),
    [(check_config, "config.yaml"), (check_mixture, "mixture.json"), (check_metrics, METRICS)],
)
def test_any_flipped_bit_of_a_record_gives_a_finding(recorded, check, name):
    saved, *rest = recorded
    needed = rest[: {check_config: 0, check_mixture: 1, check_metrics: 2}[check]]
    content, draw = saved.records[name], random.Random(0)
    for _ in range(40):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        saved.records[name] = bytes(flipped)
        assert make_check(check, saved, *needed).verdict in (OK, FAILED)
    saved.records[name] = content.replace(b"o", b"\xff")
    found = make_check(check, saved, *needed)
    assert found.verdict == FAILED
    assert found.text.startswith(name)
    assert "restore it" in found.text


def test_segments_that_see_each_other_are_found(planned):
    def leaking(query, key, value, segment_ids, positions):
        place = jax.numpy.broadcast_to(jax.numpy.arange(query.shape[1]), positions.shape)
        return xla_attention(query, key, value, jax.numpy.ones_like(segment_ids), place)

    saved, *rest = planned
    bind = make_model(saved.experiment.model, Compute("float32", attention=leaking))
    found = make_check(
        partial(check_segments, seed=0, count=1), dataclasses.replace(saved, bind=bind), *rest
    )
    assert found.verdict == FAILED
    assert "segments see each other" in found.text


def test_a_replay_by_other_versions_is_held_to_the_bars(run, planned, monkeypatch):
    monkeypatch.setattr("moi_jax.training.audit.replay.differences", lambda *_: ["jax 0 -> 1"])
    saved, data = opened(run), planned[1]
    change_parameter(run / "checkpoints" / "6")
    check = partial(check_replay, most=20)
    with jax.set_mesh(saved.mesh):
        replayed = replay(saved, data, choose_stretch(saved, 20), {4, 6})
        monkeypatch.setattr("moi_jax.training.audit.replay.replay", lambda *_: replayed)
        found = make_check(check, saved, data)
        assert (found.verdict, found.figures["bit_for_bit"]) == (OK, False)
        assert found.text.endswith("not bit for bit, because jax 0 -> 1")
        change_parameter(run / "checkpoints" / "6", to=2.0)
        found = make_check(check, saved, data)
    assert found.verdict == FAILED
    assert "saved 2.0, replayed" in found.text


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_no_damage(tmp_path):
    def check():
        raise DamagedCheckpoint(step, "parameters is missing")

    step = tmp_path / "3"
    assert make_check(check).verdict == NOT_DONE
    step.mkdir()
    assert make_check(check).verdict == FAILED


def test_checkpoints_that_are_all_deleted_while_they_are_read_are_listed_again(run, monkeypatch):
    folder = run / "checkpoints"
    folder.rename(run / "later")
    shutil.copytree(run / "later" / "3", folder / "3")

    def goes_on(step, arrays):
        if step.name == "3":
            shutil.rmtree(folder)
            if (run / "later").exists():
                (run / "later").rename(folder)
                shutil.rmtree(folder / "3")
        check_step(step, arrays)

    monkeypatch.setattr("moi_jax.training.audit.saved_run.check_step", goes_on)
    found = make_check(check_checkpoints, run)
    assert [saved.step for saved in found.value] == [6]
    (folder / "6").rename(folder / "3")
    found = make_check(check_checkpoints, run)
    assert found.verdict == FAILED
    assert "has no checkpoint any more" in found.text


def test_an_audit_whose_main_checks_were_not_made_is_not_ok(tmp_path):
    def verdict(name, of_it):
        made = {check: Finding(OK, "") for check in CHECKS} | {name: Finding(of_it, "")}
        return AuditResult(made, tmp_path, tmp_path).verdict

    assert verdict("replay", NOT_DONE) == OK
    assert verdict("mix", NOT_DONE) == NOT_DONE
    assert verdict("replay", FAILED) == FAILED


def test_a_step_that_is_not_replayed_but_logged_is_found(planned, monkeypatch):
    saved, data, _ = planned

    def of_skipped_steps(run, data, stretch, logged):
        return Replayed(None, (), [], 0.0)

    monkeypatch.setattr("moi_jax.training.audit.replay.replay", of_skipped_steps)
    same = {"different": []}
    monkeypatch.setattr("moi_jax.training.audit.replay._compare_state", lambda *_, loose: same)
    found = make_check(partial(check_replay, most=20), saved, data)
    assert found.verdict == FAILED
    assert "metrics.jsonl, step 4 has figures" in found.text


def test_a_run_whose_settings_changed_is_sound_without_its_first_checkpoints(run):
    """It goes on with another length, twice, and only the last checkpoint is kept."""
    config = run.parent / "config.yaml"
    shutil.copy(run / "config.yaml", config)
    keep = ("checkpoint.keep_last=1", "checkpoint.keep_best=0", "eval.every=0")
    longer = (f"logging.run_dir={run}", "train.steps=8", *keep)
    train_here(config, *longer, allow_change=True, stop=stop_after(1))
    train_here(config, *longer)
    saved = opened(run)
    assert [step.step for step in saved.steps] == [8]
    data = check_cache(saved).value
    found = make_check(check_metrics, saved, data, check_plan(saved, data).value)
    assert found.verdict == OK
    assert "figures only after step 6" in found.text
    with pytest.raises(NotDone, match="changed after step 6"):
        choose_stretch(saved, 20)


def steps_kept(*numbers: int, changed_at: int = 0) -> SimpleNamespace:
    kept = [SimpleNamespace(step=number) for number in numbers]
    return SimpleNamespace(steps=kept, newest=kept[0], unchanged_since=changed_at)


def test_the_newest_stretch_that_is_short_enough_is_replayed():
    run = steps_kept(100, 90, 50)
    assert choose_stretch(run, 20) == Stretch(run.steps[1], run.steps[0], 10)
    run = steps_kept(100, 60, 50)
    assert choose_stretch(run, 20) == Stretch(run.steps[2], run.steps[1], 10)
    first = choose_stretch(run, 5)
    assert (str(first), first.whole) == ("the first 5 of 40 steps from checkpoint 60", False)
    alone = steps_kept(6)
    assert str(choose_stretch(alone, 6)) == "6 steps from the start of the run"
    with pytest.raises(NotDone, match="--steps 6 replays from the start"):
        choose_stretch(alone, 5)


def test_a_checkpoint_of_a_version_that_recorded_less_is_audited(run):
    for step in (run / "checkpoints").glob("[36]"):
        item = step / "position" / "metadata"
        position = json.loads(item.read_text())
        kept = {key: position[key] for key in position.keys() - {"sources", "versions"}}
        item.write_text(json.dumps(kept))
        write_checksums(step)
    saved = opened(run)
    assert make_check(check_sources, saved).verdict == NOT_DONE
    assert make_check(check_versions, saved).verdict == NOT_DONE
    assert make_check(check_cache, saved).verdict == OK


def test_what_is_no_run_or_would_be_another_run_is_refused(whole, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"is no run: it has no config\.yaml"):
        command(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate.* would make it another run"):
        command(monkeypatch, whole, "optimizer.learning_rate=1.0", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="name either the directory of a run, or --check"):
        command(monkeypatch)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "7.0;tcp://10.0.0.1:1234")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(UserError, match="2 processes, and an audit runs in one"):
        command(monkeypatch, whole)


def test_a_config_that_cannot_be_read_is_a_finding_of_its_check(run, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    (run / "config.yaml").write_bytes(b"train: {steps\xff")
    asked = SimpleNamespace(verdict=FAILED, summary="", file=run, page=run)
    monkeypatch.setattr("moi_jax.training.audit.audit.audit", lambda *_: asked)
    assert command(monkeypatch, run) == 1  # it comes to the audit
    assert deterministic.FLAG not in os.environ["XLA_FLAGS"]
    found = make_check(check_config, opened(run))
    assert found.verdict == FAILED
    assert "is not valid YAML" in found.text
    config = run / "checkpoints" / "6" / "config" / "metadata"
    config.write_text(config.read_text().replace('"deterministic": false', '"deterministic": true'))
    assert command(monkeypatch, run) == 1
    assert deterministic.FLAG in os.environ["XLA_FLAGS"]
