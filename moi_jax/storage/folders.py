"""Whole folders in an object store. A folder is whole when its SHA256SUMS is there.

It is sent as the last object and deleted as the first, and tells the checksums of the others. So a
folder that was cut off on its way is no folder, and one that has changed since is noticed.
`sha256sum --check SHA256SUMS` verifies a copy that another tool has made.
"""

import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from moi_jax.common.checksums import SUMS, digests, read_sums
from moi_jax.storage.store import Store


class DamagedFolder(ValueError):
    """A folder of a store that is not as it was sent; the text says what is wrong."""


def folders_among(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Of the names "FOLDER/...", the folders that are whole and those that are not."""
    names = list(names)
    whole = {folder for folder, _, rest in (n.partition("/") for n in names) if rest == SUMS}
    return whole, {name.partition("/")[0] for name in names if "/" in name} - whole


def send_folder(store: Store, name: str, folder: Path) -> None:
    """Sends a local folder: the files of its checksums, and those beside them that are for people.

    What the store has under its name is replaced.

    Raises:
      OSError: a file of the folder cannot be read, or is gone.
      UserError: see `Store`.
    """
    sums = (folder / SUMS).read_bytes()
    names = {*read_sums(folder), *(each.name for each in folder.iterdir() if each.is_file())}
    delete_folder(store, name)
    store.send((f"{name}/{each}", folder / each) for each in sorted(names - {SUMS}))
    store.write(f"{name}/{SUMS}", sums)


def is_sound(folder: Path) -> bool:
    """Whether all files of a local folder are as its checksums say."""
    try:
        return not _differing(folder, read_sums(folder))
    except (OSError, ValueError):  # a file is missing, or this is no list of checksums
        return False


def delete_folder(store: Store, name: str) -> None:
    """Deletes a folder; it is no whole folder from the first moment on."""
    store.delete(f"{name}/{SUMS}")
    store.delete_below(f"{name}/")


def fetch_folder(
    store: Store, name: str, folder: Path, more: Callable[[Path], Mapping[str, str]] = lambda _: {}
) -> None:
    """Fetches a whole folder and verifies it; it appears under its local name when it is sound.

    Args:
      more: folder -> the checksums, by file, that other files of it tell.

    Raises:
      DamagedFolder: a file is missing or has changed, also when it is fetched again.
      OSError: the local disk refuses.
      UserError: see `Store`.
    """
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    try:
        _fetch(store, name, part)
        wrong = _wrong_files(part, more)
        if wrong:  # it may have happened on the way
            store.fetch((f"{name}/{each}", part / each) for each in wrong)
            wrong = _wrong_files(part, more)
        if wrong:
            raise DamagedFolder(f"{wrong[0]} has changed since it was written")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except FileNotFoundError as error:
        raise DamagedFolder(str(error)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fetch(store: Store, name: str, part: Path) -> None:
    """Fetches the files that `send_folder` sends."""
    store.fetch([(f"{name}/{SUMS}", part / SUMS)])
    try:
        files = set(read_sums(part))
    except ValueError as error:
        raise DamagedFolder(str(error)) from None
    others = {each.removeprefix(f"{name}/") for each in store.names(f"{name}/")} - {SUMS}
    files |= {other for other in others if "/" not in other}
    if any(Path(file).is_absolute() or ".." in Path(file).parts for file in files):
        raise DamagedFolder("the name of a file leads out of its folder")
    store.fetch((f"{name}/{file}", part / file) for file in sorted(files))


def _wrong_files(part: Path, more: Callable[[Path], Mapping[str, str]]) -> list[str]:
    return _differing(part, read_sums(part)) or _differing(part, more(part))


def _differing(part: Path, sums: Mapping[str, str]) -> list[str]:
    return [name for name, digest in digests(part, sorted(sums)) if digest != sums[name]]
