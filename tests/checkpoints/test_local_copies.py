"""Copies on the disk of one host: whole or not there, the newest ones, and named where damaged."""

import contextlib
import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moi_jax.checkpoints.local_agreement import newest_whole
from moi_jax.checkpoints.local_copies import LocalCopies
from moi_jax.checkpoints.local_history import forget_copies
from moi_jax.checkpoints.local_replicas import from_replicas
from moi_jax.checkpoints.local_saves import LocalSaves, local_saves
from moi_jax.common.errors import UserError
from moi_jax.config.load import make_config
from moi_jax.parallel import hosts
from moi_jax.parallel.axes import MESH_AXES

from support.runs import refusal, small_config

PARTS = {0: {"kernel": np.arange(8, dtype=np.uint8)}}


@pytest.fixture
def copies(tmp_path):
    return LocalCopies(tmp_path / "run")


def write(copies, *names, process=0):
    for name in names:
        copies.write(name, process, {"of": name}, PARTS)


def test_the_two_newest_are_kept_beside_the_one_that_is_written(copies):
    write(copies, "8.a", "9.a", "10.b")
    write(copies, "10.b", process=1)  # a slower process on the same host: nobody else may have 10
    assert sorted(copies.sound(after=0)) == ["10.b", "8.a", "9.a"]
    write(copies, "11.b")
    assert sorted(copies.sound(after=0)) == ["10.b", "11.b", "9.a"]
    assert sorted(copies.sound(after=10)) == ["11.b"]
    assert copies.sound(0)["10.b"].record == {"of": "10.b"}
    copies.keep_only("10.b")
    assert [path.name for path in copies.folder.iterdir()] == ["10.b"]


def test_the_copies_of_all_processes_of_a_host_are_found(copies):
    write(copies, "8.a")
    copies.write("8.a", 3, {}, {5: PARTS[0]})
    assert sorted(copies.sound(0)["8.a"].parts) == [0, 5]


@pytest.mark.parametrize("name", ["record.json", "0.npz", "SHA256SUMS"])
@pytest.mark.parametrize("hurt", ["changed", "deleted"])
def test_a_damaged_copy_is_named_and_not_used(copies, name, hurt, log_text):
    write(copies, "8.a", "9.a")
    file = copies.folder / "9.a" / "0" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content) if hurt == "changed" else file.unlink()
    assert sorted(copies.sound(0)) == ["8.a"]
    (line,) = log_text.getvalue().splitlines()
    assert line.startswith(f"the local copy {file.parent} on ")
    assert "is damaged and not used" in line


def test_a_folder_that_is_gone_has_no_copies(copies, log_text):
    write(copies, "8.a")
    shutil.rmtree(copies.folder)
    assert copies.sound(0) == {}
    copies.keep_only("8.a")
    assert not log_text.getvalue()


def test_a_folder_that_cannot_be_read_is_named_and_has_no_copies(copies, log_text):
    write(copies, "8.a")
    (copies.folder / "9.a").touch()
    assert sorted(copies.sound(0)) == ["8.a"]
    (line,) = log_text.getvalue().splitlines()
    assert line.startswith(f"the local copies in {copies.folder / '9.a'} on ")
    assert line.endswith("cannot be read, and are not used: Not a directory")


def test_what_is_half_written_or_half_removed_is_no_copy(copies, monkeypatch):
    write(copies, "8.a")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed meanwhile
    (copies.folder / "9.a" / "0.unfinished").mkdir(parents=True)
    copies.keep_only(None)
    assert copies.sound(0) == {}
    monkeypatch.undo()
    assert LocalCopies(copies.folder).sound(0) == {}
    assert not list(copies.folder.glob("**/*.unfinished"))


def test_a_full_disk_costs_that_save_alone(copies, monkeypatch, log_text):
    saves = LocalSaves(copies, "run", [], "a", mesh(1))
    state = kernel()
    saves.save(1, state, {}, {}, None)
    saves.wait()
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(full))
        for step in (2, 3, 4):
            saves.save(step, state, {}, {}, None)
            saves.wait()
    assert [path.name for path in copies.folder.iterdir()] == ["1.a"]
    (line,) = log_text.getvalue().splitlines()
    assert line.startswith(f"cannot write the local copy of step 2 in {copies.folder} on ")
    assert "no space left" in line
    saves.save(5, state, {}, {}, None)
    saves.close()
    assert sorted(copies.sound(0)) == ["1.a", "5.a"]


def mesh(*shape):
    sizes = (*shape, *(1,) * (4 - len(shape)))
    devices = np.array(jax.devices()[: int(np.prod(sizes))])
    return Mesh(devices.reshape(sizes), MESH_AXES)


def replicated(on):
    return NamedSharding(on, PartitionSpec())


def kernel():
    return {"kernel": jax.device_put(jnp.ones(8), replicated(mesh(1)))}


@pytest.mark.parametrize(
    ("held", "newest"),
    [
        ([{"9.a": [0, 1]}, {"9.a": [0, 1]}], "9.a"),
        ([{"9.a": [0, 1], "10.a": [0, 1]}, {"9.a": [0, 1]}], "10.a"),  # one replica is enough
        ([{"9.a": [0, 1]}, {}], "9.a"),
        ([{"9.a": [0]}, {"9.a": [1]}], "9.a"),
        ([{"9.a": [0], "8.a": [0, 1]}, {"9.b": [1]}], "8.a"),  # of two starts
        ([{"9.a": [0]}, {"9.a": [0]}], None),
        ([{}, {}], None),
    ],
)
def test_the_newest_step_of_which_some_process_has_each_part_is_taken(held, newest):
    assert newest_whole([{"needed": [0, 1], "held": each} for each in held]) == newest


def test_a_part_that_no_process_has_where_it_is_needed_cannot_be_sent():
    """The hosts came back in another order, so that each has what the other one needs."""
    reports = [{"needed": [0], "held": {"9.a": [1]}}, {"needed": [1], "held": {"9.a": [0]}}]
    assert newest_whole(reports) is None


@pytest.mark.parametrize(
    ("others", "newest", "lacking"),
    [
        ({"9.a": [0], "8.a": [0]}, "8.a", "(process 1)"),  # not process 2, which has it
        ({"9.a": [1]}, None, "(process 0, process 2)"),
    ],
)
def test_a_newer_step_that_is_not_whole_is_named(
    copies, monkeypatch, log_text, others, newest, lacking
):
    """Of three processes, 0 and 2 need part 0."""
    write(copies, *others)
    saves = LocalSaves(copies, "run", ["a"], "b", mesh(1))
    reports = [
        {"needed": [0], "held": others},
        {"needed": [1], "held": {"8.a": [1]} if newest else {"9.a": [1]}},
        {"needed": [0], "held": {}},
    ]
    answers = {"the local copies": reports, "the local copy": [{"of": newest}]}
    monkeypatch.setattr(hosts, "gather", lambda what, value: answers[what])
    monkeypatch.setattr(saves, "_unfit", lambda *_: None)
    found = saves.newest(7, 9, lambda beside_base: {})
    saves.close()
    assert (found and found.path.name) == newest
    line = log_text.getvalue().splitlines()[0]
    assert line.startswith("step 9 on the hosts' own disks is not used: ")
    assert f" are on the hosts that need them {lacking}; " in line


def test_what_travels_from_a_replica_keeps_its_bits():
    """-0.0 and the payload of a NaN are lost where floats are added."""
    on = mesh(2, 2)
    values = np.array([-0.0, 1.5, np.nan, -np.inf, 1e-42, 3.0, 7.0], np.float32)
    values.view(np.uint32)[2] |= 0x1234
    content = values.view(np.uint8)[:27]  # no whole number of words
    devices = list(on.devices.flat)
    there = {devices[0]: content, devices[3]: content[::-1].copy()}
    filled = from_replicas(there, devices, content.size, on)
    for device, expected in zip(devices, [content, content[::-1]] * 2, strict=True):
        np.testing.assert_array_equal(filled[device], expected)


def test_a_state_of_any_dtypes_comes_back_bit_by_bit(copies):
    on = mesh(2, 2, 2)
    rows = NamedSharding(on, PartitionSpec("fsdp", "tensor"))
    state = {
        "kernel": jax.device_put(np.random.default_rng(0).normal(size=(4, 6)), rows),
        "moment": (jax.device_put(jnp.full((2, 2), -0.0, jnp.bfloat16), rows),),
        "codes": jax.device_put(jnp.arange(8, dtype=jnp.int4), replicated(on)),
        "step": jax.device_put(jnp.int32(7), replicated(on)),
    }
    before = jax.tree.map(np.asarray, jax.device_get(state))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    saves = LocalSaves(copies, "run", ["a"], "a", on)
    saves.save(7, state, {"row": 3}, {}, None)
    jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x), donate_argnums=0)(state)
    saves.wait()
    found = saves.newest(6, 7, lambda beside_base: abstract)
    assert (found.step, found.record["position"], found.lacking) == (7, {"row": 3}, False)
    restored = saves.restore(found, abstract)
    for mine, other in zip(jax.tree.leaves(restored), jax.tree.leaves(before), strict=True):
        assert mine.dtype == other.dtype
        assert np.asarray(mine).tobytes() == other.tobytes()
    saves.close()


@pytest.mark.parametrize("hurt", ["deleted", "changed"])
def test_a_copy_that_is_hurt_before_it_is_read_ends_the_run_with_one_line(copies, hurt):
    saves = LocalSaves(copies, "run", ["a"], "a", mesh(1))
    saves.save(7, kernel(), {}, {}, None)
    saves.wait()
    found = saves.newest(6, 7, lambda beside_base: kernel())
    (file,) = found.copy.parts.values()
    content = file.read_bytes().replace(np.ones(8, np.float32).tobytes(), bytes(32))
    file.write_bytes(content) if hurt == "changed" else file.unlink()
    with pytest.raises(
        UserError, match=r"cannot be read any more: .*; give the same command again"
    ):
        saves.restore(found, kernel())
    saves.close()


def abstract_leaf(on, *shape, over=()):
    sharding = NamedSharding(on, PartitionSpec(*over))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"history": ["9", "7.a"]}, None),
        ({"history": ["b", "7.c"]}, "it belongs to another history of the run"),
        ({"logged": 6}, "the metrics of the run end at step 6"),
        ({"on": (1, 2, 2)}, "it has the mesh {'data': 2, 'fsdp': 2, 'tensor': 1, 'context': 1}, "),
        ({"rank": 2}, "of ['down'] it has (4, 4) over ('fsdp',), and the run needs (4, 2) over "),
        ({"over": (None, "fsdp")}, "of ['down'] it has (4, 4) over ('fsdp',), and the run needs "),
        ({"name": "up"}, "of ['down'] it has (4, 4) over ('fsdp',), and the run needs None"),
    ],
)
def test_a_copy_from_which_the_run_cannot_go_on_is_named(copies, log_text, changed, said):
    on = mesh(2, 2)
    rows = NamedSharding(on, PartitionSpec("fsdp"))
    saves = LocalSaves(copies, "run", [], "a", on)
    saves.save(7, {"down": jax.device_put(jnp.ones((4, 4)), rows)}, {}, {}, None)
    saves.close()
    on = mesh(*changed.get("on", (2, 2)))
    leaf = abstract_leaf(on, 4, changed.get("rank", 4), over=changed.get("over", ("fsdp",)))
    state = {changed.get("name", "down"): leaf}
    again = LocalSaves(copies, "run", changed.get("history", ["a"]), "b", on)
    found = again.newest(6, changed.get("logged", 7), lambda beside_base: state)
    again.close()
    (line,) = log_text.getvalue().splitlines()
    if said is None:
        assert found.step == 7
    else:
        assert found is None
        assert line.startswith(f"the local copy {copies.folder / '7.a'} on ")
        assert f" is not used: {said}" in line


def test_hosts_that_come_back_have_no_copies_that_the_run_goes_on_from(tmp_path, log_text):
    """The run went on with other hosts, from a checkpoint, while those of copy 7 were away."""
    run, disk, away = (tmp_path / name for name in ("run", "disk", "away"))
    run.mkdir()
    config = make_config({"checkpoint": {"local_every": 1, "local_dir": str(disk)}}).checkpoint
    state = kernel()
    found = []

    def start(*steps):
        with contextlib.suppress(ZeroDivisionError), local_saves(config, run, mesh(1)) as saves:
            newest = saves.newest(5, 9, lambda beside_base: state)
            found.append(newest and newest.step)
            saves.begin(run, newest.path.name if newest else "5")
            for step in steps:
                saves.save(step, state, {}, {}, None)
            1 / 0  # noqa: B018

    start(7)
    start()  # killed before its first copy
    start()
    disk.rename(away)
    start(6)
    shutil.rmtree(disk)
    away.rename(disk)
    start()
    assert found == [None, 7, 7, None, None]
    assert "it belongs to another history of the run" in log_text.getvalue()
    assert not list(disk.glob("*/*"))


@pytest.fixture
def one_copy(tmp_path):
    """The run directory and the settings of a run that failed after its local copy of step 7."""
    (tmp_path / "run").mkdir()
    place = {"local_every": 1, "local_dir": str(tmp_path / "disk")}
    config = make_config({"checkpoint": place}).checkpoint
    with (
        contextlib.suppress(ZeroDivisionError),
        local_saves(config, tmp_path / "run", mesh(1)) as saves,
    ):
        saves.begin(tmp_path / "run", "")
        saves.save(7, kernel(), {}, {}, None)
        1 / 0  # noqa: B018
    return tmp_path / "run", config


def test_a_copy_behind_a_run_that_went_on_without_copies_is_not_used(one_copy, log_text):
    """Its directory came from an object store, which keeps what was removed elsewhere."""
    run, config = one_copy
    store = {"run_id": (run / "run_id").read_text()}
    forget_copies(run)
    for file in run.iterdir():
        store[file.name] = file.read_text()
    (run / "run_id").write_text(store["run_id"])
    with local_saves(config, run, mesh(1)) as saves:
        assert saves.newest(5, 9, lambda beside_base: kernel()) is None
        saves.begin(run, "5")
        assert not list(saves.copies.folder.iterdir())
    assert "it belongs to another history of the run" in log_text.getvalue()


def test_no_copy_is_removed_before_the_history_is_written(one_copy):
    run, config = one_copy
    (run / "run_id.new").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/run_id, .* belong to the run: "):
        forget_copies(run)
    with (
        pytest.raises(
            UserError, match=r"cannot write .*/run_id, .*: Is a directory; give the same"
        ),
        local_saves(config, run, mesh(1)) as saves,
    ):
        saves.begin(run, "5")
    (run / "run_id.new").rmdir()
    with local_saves(config, run, mesh(1)) as saves:
        assert saves.newest(5, 9, lambda beside_base: kernel()).step == 7


def test_a_mesh_without_a_replica_on_another_host_is_refused(tmp_path):
    said = refusal(small_config(tmp_path), "checkpoint.local_every=1")
    assert "mesh.data must be at least 2 across hosts" in said


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"local_every": 500}, "local_every 500 has no effect beside every 500"),
        ({"local_dir": "/dev/shm/copies"}, "local_dir has no effect without local_every"),
        ({"local_every": 5, "local_dir": "gs://bucket/copies"}, "is a URL"),
    ],
)
def test_settings_that_have_no_effect_are_refused(checkpoint, message):
    with pytest.raises(UserError, match=message):
        make_config({"checkpoint": checkpoint})


@pytest.mark.parametrize("content", ["", "../../others", "/tmp", "ab"])
def test_what_is_no_id_names_no_folder_that_is_removed(tmp_path, content):
    disk, run = tmp_path / "disk", tmp_path / "run"
    (disk / "another").mkdir(parents=True)
    (tmp_path / "others").mkdir()
    run.mkdir()
    (run / "run_id").write_text(content)
    config = make_config({"checkpoint": {"local_every": 1, "local_dir": str(disk)}}).checkpoint
    with local_saves(config, run, mesh(1)) as saves:
        assert saves.copies.folder.parent == disk
        assert len(saves.copies.folder.name) == 32
    assert [path.name for path in disk.iterdir()] == ["another"]


def test_a_copied_run_directory_has_copies_of_its_own(tmp_path):
    disk, folders = tmp_path / "disk", []
    config = make_config({"checkpoint": {"local_every": 1, "local_dir": str(disk)}}).checkpoint
    for name in ("run", "run", "copied"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "run_id").write_text("0" * 32)
        with local_saves(config, tmp_path / name, mesh(1)) as saves:
            folders.append(saves.copies.folder)
    assert folders[0] == folders[1] != folders[2]


def test_other_users_cannot_read_or_replace_the_copies(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = make_config({"checkpoint": {"local_every": 1}}).checkpoint
    with local_saves(config, tmp_path / "run", mesh(1)):
        pass
    (folder,) = tmp_path.glob("moi_jax_*")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with (
        pytest.raises(UserError, match="can be written by other users"),
        local_saves(config, tmp_path / "run", mesh(1)),
    ):
        pass


def test_a_link_in_the_place_of_the_default_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"moi_jax_{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    config = make_config({"checkpoint": {"local_every": 1}}).checkpoint
    with (
        pytest.raises(UserError, match=r"is a link, .* in checkpoint\.local_dir"),
        local_saves(config, tmp_path / "run", mesh(1)),
    ):
        pass


def test_a_folder_that_is_cleaned_up_in_the_run_is_made_anew(tmp_path, monkeypatch, log_text):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = make_config({"checkpoint": {"local_every": 1}}).checkpoint
    state = kernel()
    with local_saves(config, tmp_path / "run", mesh(1)) as saves:
        own = saves.copies.folder.parent
        for step in (1, 2):
            saves.save(step, state, {}, {}, None)
            saves.wait()
            assert len(saves.copies.sound(after=step - 1)) == 1
            shutil.rmtree(own)
        own.mkdir()
        own.chmod(0o777)  # by another user
        saves.save(3, state, {}, {}, None)
        saves.wait()
        assert not list(own.iterdir())
        own.rmdir()
        saves.save(4, state, {}, {}, None)
        saves.wait()
        assert own.stat().st_mode & 0o777 == 0o700
    (line,) = log_text.getvalue().splitlines()
    assert line.startswith("cannot write the local copy of step 3 in ")
    assert "can be written by other users" in line
