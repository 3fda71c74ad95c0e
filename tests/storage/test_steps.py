"""The checkpoints of a run in a store: which are kept there, set aside, fetched, left alone."""

import shutil

import pytest

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
