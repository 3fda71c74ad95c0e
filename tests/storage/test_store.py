"""Objects and whole folders in a store, and what is told when it fails."""

import threading
import time
from pathlib import Path

import pytest

from moi_jax.common.checksums import SUMS, write_sums
from moi_jax.common.errors import LOST, Unreachable, UserError
from moi_jax.storage.folders import DamagedFolder, fetch_folder, folders_among, send_folder
from moi_jax.storage.store import Store

from support.object_stores import SECRET


@pytest.fixture
def folder(tmp_path):
    """A folder with files at two depths, one of them empty."""
    made = tmp_path / "folder"
    (made / "deep" / "er").mkdir(parents=True)
    files = {"small": b"1", "deep/empty": b"", "deep/er/large": bytes(range(256)) * 5000}
    for name, content in files.items():
        (made / name).write_bytes(content)
    write_sums(made, sorted(files))
    return made


def content_of(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def _wait(done):
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_objects_are_those_that_others_see(server):
    store = Store(server.place("objects"))
    store.write("a/b", b"1")
    store.write("a/c", b"2")
    store.write("ab", b"3")
    server.put("objects/other", b"4")
    server.put("objects/folder/", b"")  # what the consoles of the clouds make
    assert store.names() == ["a/b", "a/c", "ab", "other"]
    assert store.names("a/") == ["a/b", "a/c"]
    assert (store.read("other"), store.read("none")) == (b"4", None)
    assert server.get("objects/a/c") == b"2"
    store.delete("other")
    store.delete_below("a/")
    assert store.names() == ["ab"]


def test_a_folder_comes_back_as_it_was(server, folder, tmp_path):
    store = Store(server.place("folders"))
    server.put("folders/f/left_by_an_older_one", b"")
    send_folder(store, "f", folder)
    fetch_folder(store, "f", tmp_path / "back")
    assert content_of(tmp_path / "back") == content_of(folder)
    assert {name.removeprefix("folders/f/") for name in server.names("folders/f/")} == set(
        content_of(folder)
    )


@pytest.mark.parametrize("size", [100, 3_000, 200_000, 1_200_000])
def test_a_folder_that_is_cut_off_on_its_way_is_none(s3, folder, size):
    store = Store(s3.place(f"cut/{size}"), patience=0)
    send_folder(store, "whole", folder)
    send_folder(store, "half", folder)  # by a run before, which this one replaces
    (folder / "new").write_bytes(b"new")
    write_sums(folder, sorted({*content_of(folder)} - {SUMS}))
    with s3.proxy.closing_after(size), pytest.raises(Unreachable):
        send_folder(store, "half", folder)
    whole, half = folders_among(store.names())
    # The first request is larger than 100 bytes: then nothing has changed.
    assert whole == ({"whole"} if size > 100 else {"whole", "half"})
    assert half <= {"half"}
    send_folder(store, "half", folder)
    assert folders_among(store.names()) == ({"whole", "half"}, set())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda s3: s3.put("damaged/f/small", b"2"), "small has changed since it was written"),
        (lambda s3: s3.delete("damaged/f/deep/empty"), "deep/empty is missing"),
        (lambda s3: s3.put(f"damaged/f/{SUMS}", b"nonsense"), "is not a list of checksums"),
        (
            lambda s3: s3.put(f"damaged/f/{SUMS}", b"0" * 64 + b"  ../out\n"),
            "leads out of its folder",
        ),
    ],
)
def test_a_damaged_folder_is_named_and_does_not_appear(s3, folder, tmp_path, damage, told):
    store = Store(s3.place("damaged"))
    send_folder(store, "f", folder)
    damage(s3)
    with pytest.raises(DamagedFolder, match=told):
        fetch_folder(store, "f", tmp_path / "place" / "back")
    assert list((tmp_path / "place").iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_store_that_fails_for_a_while_is_tried_again(server, log_text):
    store = Store(server.place("fails"), patience=60)
    with server.proxy.closed():
        writing = threading.Thread(target=store.write, args=("late", b"1"))
        writing.start()
        _wait(log_text.getvalue)
    writing.join(timeout=60)
    assert server.get("fails/late") == b"1"
    (told,) = log_text.getvalue().splitlines()  # once, however often it was tried
    assert f"cannot write {server.url('fails/late')}: " in told
    assert "trying again for 60 s" in told


def test_a_store_that_does_not_come_back_ends_with_a_status_to_come_again(server):
    store = Store(server.place("gone"), patience=1)
    with server.proxy.closed(), pytest.raises(Unreachable) as error:
        store.read("any")
    assert error.value.exit_status == LOST
    assert f"cannot read {server.scheme}://bucket/gone/any" in str(error.value)
    assert "give the same command again when the store works" in str(error.value)


def test_a_bucket_that_is_missing_is_told_at_once(server):
    place = server.place("x").parent.parent / "nobucket" / "run"
    with pytest.raises(UserError) as error:
        Store(place).write("name", b"")
    assert error.value.exit_status == 2
    assert "make the bucket, or name another" in str(error.value)
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)


def test_a_bucket_with_an_impossible_name_is_told(s3):
    with pytest.raises(UserError, match="cannot be opened"):
        Store(Path("s3://Bucket!/run"))
