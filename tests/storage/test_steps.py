"""The checkpoints of a run in a store: which are kept there, set aside, fetched, left alone."""

import shutil

import pytest

from moi_jax.checkpoints import damaged_steps
from moi_jax.checkpoints.damage import DamagedCheckpoint
from moi_jax.checkpoints.items import all_steps
from moi_jax.checkpoints.stored_steps import ASIDE, StoredSteps
from moi_jax.common.checksums import SUMS, write_sums
from moi_jax.common.errors import Unreachable, UserError


@pytest.fixture
def steps(tmp_path):
    """Makes a local folder with these steps, each of one file; the folder's content is replaced."""

    def make(*numbers: int):
        folder = tmp_path / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        for number in numbers:
            step = folder / str(number)
            (step / "parameters").mkdir(parents=True)
            (step / "parameters" / "data").write_bytes(f"values of {number}".encode())
            write_sums(step, ["parameters/data"])
        return folder

    return make


@pytest.fixture
def run(s3, request):
    """The place of a run, and the names of its objects."""
    name = f"steps/{request.node.name}"
    return s3.place(name), lambda: [n.removeprefix(f"{name}/checkpoints/") for n in s3.names(name)]


def objects(*numbers: int) -> list[str]:
    return sorted(f"{n}/{file}" for n in numbers for file in (SUMS, "parameters/data"))


def test_the_store_holds_the_steps_that_are_kept(steps, run):
    place, names = run
    stored = StoredSteps(place, 60)
    stored.send(all_steps(steps(2, 4)))
    assert names() == objects(2, 4)
    stored.send(all_steps(steps(4, 6)))
    assert names() == objects(4, 6)
    StoredSteps(place, 60).send(all_steps(steps(6, 8)))  # another process, which goes on
    assert names() == objects(6, 8)


def test_without_a_step_here_none_is_deleted_there(steps, run):
    place, names = run
    StoredSteps(place, 60).send(all_steps(steps(2, 4)))
    StoredSteps(place, 60).send([])
    assert names() == objects(2, 4)


def test_no_old_step_is_deleted_before_the_new_one_has_arrived(steps, run, s3):
    place, names = run
    stored = StoredSteps(place, 0)
    stored.send(all_steps(steps(2)))
    with s3.proxy.closed(), pytest.raises(Unreachable):
        stored.send(all_steps(steps(4)))
    assert names() == objects(2)
    stored.send(all_steps(steps(4)))
    assert names() == objects(4)


def test_a_step_that_was_made_again_replaces_the_one_there(steps, run, s3):
    place, names = run
    StoredSteps(place, 60).send(all_steps(steps(2)))
    folder = steps(2)
    (folder / "2" / "parameters" / "data").rename(folder / "2" / "parameters" / "others")
    write_sums(folder / "2", ["parameters/others"])
    StoredSteps(place, 60).send(all_steps(folder))
    assert names() == sorted([f"2/{SUMS}", "2/parameters/others"])


def test_a_damaged_step_is_set_aside_and_the_one_before_it_fetched(steps, run, s3, log_text):
    place, names = run
    stored = StoredSteps(place, 60)
    stored.send(all_steps(steps(2, 4)))
    s3.put(f"{names_in(place)}/checkpoints/4/parameters/data", b"others")
    folder = steps()
    stored.fetch(folder, strict=False)
    assert [step.name for step in all_steps(folder)] == ["2"]
    assert names() == [*objects(2), f"4/{ASIDE}", "4/parameters/data"]
    assert "parameters/data has changed since it was written" in log_text.getvalue()
    assert "the run goes on from step 2 and repeats 2" in log_text.getvalue()


def test_a_step_that_was_cut_off_goes_when_another_one_has_arrived(steps, run, s3, log_text):
    place, names = run
    s3.put(f"{names_in(place)}/checkpoints/2/parameters/data", b"cut off")
    stored = StoredSteps(place, 60)
    stored.send([])
    assert names() == ["2/parameters/data"]
    assert "checkpoint 2 in s3://" in log_text.getvalue()
    stored.send(all_steps(steps(4)))
    assert names() == objects(4)


def test_where_all_steps_were_cut_off_no_run_begins(steps, run, s3):
    place, names = run
    s3.put(f"{names_in(place)}/checkpoints/2/parameters/data", b"cut off")
    with pytest.raises(UserError, match=f"checkpoint 2 in s3://.* has no {SUMS}, and no other"):
        StoredSteps(place, 60).fetch(steps(), strict=False)
    assert names() == ["2/parameters/data"]


def test_the_newest_step_is_sent_first_and_one_that_went_too_soon_is_told(steps, run, log_text):
    place, names = run
    folder = steps(2, 4)
    listed = all_steps(folder)
    shutil.rmtree(folder / "2")
    (folder / "4" / "parameters" / "data").unlink()
    StoredSteps(place, 60).send(listed)
    said = log_text.getvalue()
    for step in (2, 4):
        assert f"checkpoint {step} was deleted here before it had arrived in s3://" in said
    assert said.index("checkpoint 4") < said.index("checkpoint 2")
    assert "raise checkpoint.keep_last or checkpoint.every" in said
    StoredSteps(place, 60).send(all_steps(steps(6)))
    assert names() == objects(6)


def test_the_store_is_compared_with_what_is_here(steps, run):
    place, _ = run
    stored = StoredSteps(place, 60)
    assert not stored.are_newer(steps(2))
    assert stored.lack_any(steps(2))
    stored.send(all_steps(steps(2, 4)))
    for here, newer, lacking in (
        ((2, 4), False, False),
        ((4, 6), False, True),
        ((2,), True, False),
        ((1, 3), True, False),  # no longer kept there
        ((), True, False),
    ):
        assert stored.are_newer(steps(*here)) == newer
        assert stored.lack_any(steps(*here)) == lacking
    (steps(2, 4) / "4" / SUMS).write_text("others")
    assert stored.are_newer(steps().parent / "none")
    other = steps(2, 4)
    (other / "4" / SUMS).write_text("others")
    assert stored.are_newer(other)
    assert stored.lack_any(other)


def test_a_damaged_step_is_fetched_again(steps, run, s3, log_text):
    """The step in the store is sound, and stays."""
    place, names = run
    stored = StoredSteps(place, 60)
    stored.send(all_steps(steps(2)))
    data = steps(2) / "2" / "parameters" / "data"
    data.write_bytes(b"others")
    assert stored.fetch_again(data.parent.parent)
    assert data.read_bytes() == b"values of 2"
    s3.put(f"{names_in(place)}/checkpoints/2/parameters/data", b"others")
    data.write_bytes(b"other ones")
    assert not stored.fetch_again(data.parent.parent)
    assert data.read_bytes() == b"other ones"
    assert names() == objects(2)


@pytest.mark.parametrize("sums", ["no checksums", f"{'0' * 64}  parameters/data\n"])
def test_a_damaged_step_does_not_replace_the_one_there(steps, run, sums, log_text):
    place, names = run
    StoredSteps(place, 60).send(all_steps(steps(2, 4)))
    folder = steps(2, 4)
    (folder / "2" / SUMS).write_text(sums)
    stored = StoredSteps(place, 60)
    stored.send(all_steps(folder))
    assert "checkpoint 2 is damaged here, and is not sent" in log_text.getvalue()
    assert names() == objects(2, 4)
    assert stored.fetch_again(folder / "2")


def test_a_damaged_step_is_set_aside_only_if_no_sound_one_is_fetched(
    steps, run, monkeypatch, log_text
):
    place, _ = run
    stored = StoredSteps(place, 60)
    stored.send(all_steps(steps(4)))
    folder = steps(2, 4, 6)
    sound = {f"values of {number}".encode() for number in (2, 4, 6)}

    def check(step, arrays):
        if (step / "parameters" / "data").read_bytes() not in sound:
            raise DamagedCheckpoint(step, "data has changed")

    monkeypatch.setattr(damaged_steps, "check_step", check)
    for step in (4, 6):
        (folder / str(step) / "parameters" / "data").write_bytes(b"others")
    damaged_steps.set_aside_damaged_steps(folder, True, False, stored.fetch_again)
    assert [step.name for step in all_steps(folder)] == ["4", "2"]
    assert "checkpoint 4 was damaged (data has changed) and is fetched again" in log_text.getvalue()
    assert "the run goes on from step 4 and repeats 2" in log_text.getvalue()


def names_in(place) -> str:
    return "/".join(place.parts[2:])


@pytest.mark.parametrize(
    ("damaged", "strict", "told"),
    [
        ((2, 4), False, "no sound checkpoint is left in s3://"),
        ((4,), True, "a strict resume goes back to no older checkpoint"),
    ],
)
def test_where_no_step_may_be_used_nothing_is_changed(steps, run, s3, damaged, strict, told):
    place, names = run
    stored = StoredSteps(place, 60)
    stored.send(all_steps(steps(2, 4)))
    s3.put(f"{names_in(place)}/checkpoints/6/parameters/data", b"cut off")
    for step in damaged:
        s3.put(f"{names_in(place)}/checkpoints/{step}/parameters/data", b"others")
    before = names()
    with pytest.raises(UserError, match=told):
        stored.fetch(steps(), strict)
    assert names() == before
