"""Paths of sources: directories, globs, and what in them is no file."""

import io
from pathlib import Path

import pytest

from moi_jax.common.errors import UserError
from moi_jax.config import Source
from moi_jax.data.sources.rows import expand

from support.sources import chat, run, section, texts, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    names = ("d/b.jsonl", "d/a.json.gz", "d/e/c.CSV", "d/e/f/x.array_record-00000-of-00002")
    others = ("d/README.md", "d/.hidden.jsonl", "d/.cache/x.jsonl", "d/e/notes.txt")
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def files(root: Path, path: str) -> list[str]:
    ((*found,),) = expand(root, [Source(path=path)], root)
    return [file.name for file in found]


def test_directory_stands_for_the_files_of_rows_in_and_below_it(root: Path) -> None:
    expected = ["d/a.json.gz", "d/b.jsonl", "d/e/c.CSV", "d/e/f/x.array_record-00000-of-00002"]
    for path in ("d", "d/", str(root / "d")):
        assert [Path(name) for name in files(root, path)] == [
            Path(path) / Path(name).relative_to("d") for name in expected
        ]
    (root / "d").rename(root / "d[1]*")
    assert files(root, "d[1]*") == [name.replace("d/", "d[1]*/", 1) for name in expected]


def test_directory_without_a_file_of_rows_is_refused(root: Path) -> None:
    (root / "d" / "e" / "c.CSV").unlink()
    (root / "d" / "e" / "f" / "x.array_record-00000-of-00002").unlink()
    with pytest.raises(UserError, match=r"no file in the directory 'd/e' below data\.root"):
        files(root, "d/e")


def test_packed_files_of_a_directory_are_told(root: Path, log_text: io.StringIO) -> None:
    assert len(files(root, "d")) == 4
    assert "packed" not in log_text.getvalue()
    for name in ("b.jsonl.bz2", "e/c.csv.XZ", "more.tar.gz", "rows.zip"):
        (root / "d" / name).touch()
    assert len(files(root, "d")) == 4
    told = " ".join(log_text.getvalue().split())
    listed = "d/b.jsonl.bz2, d/e/c.csv.XZ, d/more.tar.gz and 1 more"
    assert f"the directory 'd' holds packed files, which are not read: {listed}; unpack" in told


def test_glob_tells_the_directories_that_it_does_not_read(
    root: Path, log_text: io.StringIO
) -> None:
    (root / "d" / "more.jsonl").mkdir()
    assert files(root, "d/*.jsonl") == ["d/b.jsonl"]
    told = " ".join(log_text.getvalue().split())
    assert "'d/*.jsonl' matches directories, whose files are not read: d/more.jsonl;" in told
    log_text.truncate(0)
    (root / "d" / "more.jsonl" / "x.jsonl").touch()
    assert len(files(root, "d/**/*")) == 7
    assert "not read" not in log_text.getvalue()
    with pytest.raises(UserError, match=r"no file matches 'd/\*\.jsonl/'"):
        files(root, "d/*.jsonl/")


@pytest.mark.parametrize("path", ["d", "d/**/*.jsonl", "**"])
def test_links_in_a_circle_are_refused_by_name(root: Path, path: str) -> None:
    (root / "d" / "e" / "up").symlink_to(root / "d")
    (root / "d" / "e" / "itself").symlink_to("itself")
    with pytest.raises(UserError, match=r"a symbolic link leads from .*d/e/up back to .*/d, which"):
        files(root, path)
    assert files(root, "d/*.jsonl") == ["d/b.jsonl"]


def test_two_links_that_lead_to_each_other_end_in_one_line(root: Path) -> None:
    for name, other in (("x", "y"), ("y", "x")):
        (root / "d" / name).mkdir()
        for number in range(3):  # a glob would follow 3 to the power of 40 paths
            (root / "d" / name / f"to{number}").symlink_to(root / "d" / other)
    with pytest.raises(UserError, match="a symbolic link leads from"):
        files(root, "d/**/*.jsonl")


def test_link_to_another_place_is_followed(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "z.jsonl").touch()
    (root / "d" / "link").symlink_to(root / "elsewhere")
    assert files(root, "d")[-1] == "d/link/z.jsonl"


@pytest.mark.parametrize("target", ["b2.jsonl", "missing"])
def test_link_to_nothing_or_to_itself_is_refused(root: Path, target: str) -> None:
    (root / "d" / "b2.jsonl").symlink_to(target)
    for path in ("d", "d/*.jsonl"):
        with pytest.raises(UserError, match=r"d/b2\.jsonl is not a file that can be read"):
            files(root, path)


def test_directory_is_prepared_like_its_files(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."))
    write(root / "a" / "deep" / "2.jsonl", chat("Bye", "Bye."))
    (found,) = run(section(root, "a", source={"path": "a"}))
    (plain,) = run(section(root, "a", source={"path": "a/**/*.jsonl"}))
    assert found.key == plain.key
    assert len(texts(found)) == 2
