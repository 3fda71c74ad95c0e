"""Faults in files: each file of the newest checkpoint, of the cache and of the run is damaged."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tensorstore
from cases import Case
from verdicts import EXACT, NAMED_STOP, Verdict, judge_run
from workplace import Skip, Workplace

Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if not content:
        raise Skip("the file is empty")
    content[len(content) * 5 // 8] ^= 1  # in lengths.npy this is the length of an instruction
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Damage] = {
    "a bit flipped": flip,
    "cut to half": cut,
    "emptied": empty,
    "deleted": Path.unlink,
}

# Every file of a checkpoint. The names of array files are random: the largest and the smallest.
ARRAY_FILES = (
    *("_METADATA", "_sharding", "array_metadatas/process_0", "commit_success.txt"),
    *("manifest.ocdbt", "d/* largest", "ocdbt.process_0/manifest.ocdbt"),
    *("ocdbt.process_0/d/* largest", "ocdbt.process_0/d/* smallest"),
)
JSON_ITEMS = ("config", "model", "position", "prompts", "provenance", "tokenizer")
CHECKPOINT_FILES = (
    *("_CHECKPOINT_METADATA", "commit_success.txt", "SHA256SUMS"),
    *(f"{item}/{name}" for item in ("parameters", "optimizer") for name in ARRAY_FILES),
    *(f"{item}/{name}" for item in JSON_ITEMS for name in ("metadata", "commit_success.txt")),
    *("metrics/metrics", "metrics/commit_success.txt"),
)
CACHE_FILES = (
    *(f"domain/{name}" for name in ("lengths.npy", "hashes.npy", "manifest.json", "blocks.json")),
    *("domain/SHA256SUMS", "block/instructions.array_record", "block/lengths.npy"),
    *("block/hashes.npy", "block/counts.json", "block/SHA256SUMS"),
)


def raise_number(key: str, metadata: Path) -> None:
    """Adds one to a number of a JSON item."""
    values = json.loads(metadata.read_text(encoding="utf-8"))
    values[key] += 1
    metadata.write_text(json.dumps(values), encoding="utf-8")


def write_nan(item: Path) -> None:
    """Writes a NaN into an array of a checkpoint."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{item}/", "path": "final_norm.scale/"},
    }
    array = tensorstore.open(spec).result()
    array[0].write(np.float32("nan")).result()


def save_nan(step: Path) -> None:
    """Makes a checkpoint that was saved with a NaN: its checksums are right."""
    sums = step / "SHA256SUMS"
    if not sums.exists():
        raise Skip("there are no checksums")
    write_nan(step / "parameters")
    files = sorted(path for path in step.rglob("*") if path.is_file() and path != sums)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(step)}\n"
        for path in files
    ]
    sums.write_text("".join(lines), encoding="utf-8")


def add_file(item: Path) -> None:
    (item / "d" / "more").write_bytes(b"more")


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut_last_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def append_garbage(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'\xff\xfe{"step"\n\0')


def replace_by_garbage(path: Path) -> None:
    path.write_bytes(b"\xff\xfe{")


def leave_part(checkpoints: Path) -> None:
    """Leaves what a killed save leaves: a part of the last step under its temporary name."""
    newest = max(int(step.name) for step in checkpoints.iterdir())
    part = checkpoints / f"{newest + 1}.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints / str(newest), part)
    shutil.rmtree(part / "optimizer")


def leave_empty_step(checkpoints: Path) -> None:
    (checkpoints / "999").mkdir()


def leave_cache_part(cache: Path) -> None:
    domain = find(cache, "*/lengths.npy").parent
    shutil.copytree(domain, cache / f"{domain.name}.{'0' * 32}.part")


NEWEST = "checkpoints/{newest}"
POSITION = f"{NEWEST}/position/metadata"
# Place, fault, path in the run directory, damage, demanded verdict.
MORE_OF_CHECKPOINTS: tuple[tuple[str, str, str, Damage, str], ...] = (
    ("newest's position", "row one more", POSITION, partial(raise_number, "row"), EXACT),
    ("newest's position", "step one more", POSITION, partial(raise_number, "step"), EXACT),
    ("newest's position", "deleted", f"{NEWEST}/position", shutil.rmtree, EXACT),
    ("newest's parameters", "a NaN written", f"{NEWEST}/parameters", write_nan, EXACT),
    ("newest's parameters", "saved with a NaN", NEWEST, save_nan, NAMED_STOP),
    ("newest's parameters", "a file added", f"{NEWEST}/parameters", add_file, EXACT),
    ("newest's parameters", "deleted", f"{NEWEST}/parameters", shutil.rmtree, EXACT),
    ("newest's optimizer", "deleted", f"{NEWEST}/optimizer", shutil.rmtree, EXACT),
    ("newest", "emptied", NEWEST, empty_folder, EXACT),
    ("newest", "deleted", NEWEST, shutil.rmtree, EXACT),
    ("all", "a part of a save left", "checkpoints", leave_part, EXACT),
    ("all", "an empty newer step left", "checkpoints", leave_empty_step, EXACT),
    ("all", "deleted", "checkpoints", shutil.rmtree, EXACT),
)
MORE_OF_THE_CACHE: tuple[tuple[str, str, Damage], ...] = (
    ("all", "deleted", shutil.rmtree),
    ("all", "a .part folder left", leave_cache_part),
    ("blocks", "deleted", lambda cache: shutil.rmtree(cache / "blocks")),
)
# File, fault, damage, demanded verdict.
RUN_FILES: tuple[tuple[str, str, Damage, str | None], ...] = (
    ("metrics.jsonl", "last line cut", cut_last_line, EXACT),
    ("metrics.jsonl", "garbage appended", append_garbage, EXACT),
    ("samples.jsonl", "last line cut", cut_last_line, EXACT),
    ("config.yaml", "replaced by garbage", replace_by_garbage, EXACT),
    ("config.yaml", "deleted", Path.unlink, EXACT),
    ("mixture.json", "replaced by garbage", replace_by_garbage, EXACT),
    ("mixture.json", "deleted", Path.unlink, EXACT),
    (".moi_jax.lock", "left with a text", lambda path: path.write_text("1"), EXACT),
    (".moi_jax.lock", "deleted", Path.unlink, None),
)


def find(folder: Path, pattern: str) -> Path:
    """The file of a pattern: a path, or a glob with "largest" or "smallest" after it."""
    glob, _, which = pattern.partition(" ")
    found = sorted(folder.glob(glob), key=lambda path: (path.stat().st_size, path))
    if not found:
        raise Skip("there is no such file")
    return found[0 if which == "smallest" else -1]


def damages() -> Iterator[Case]:
    for file in CHECKPOINT_FILES:
        for fault, damage in DAMAGES.items():
            play = partial(hurt, "halfway", partial(_of_newest, file), damage)
            yield Case("newest checkpoint", file, fault, play, EXACT)
    for place, fault, path, damage, demanded in MORE_OF_CHECKPOINTS:
        play = partial(hurt, "halfway", partial(_of_run, path), damage)
        yield Case("checkpoints", place, fault, play, demanded)
    yield from _flipped_parameters()
    for file in CACHE_FILES:
        for fault, damage in DAMAGES.items():
            play = partial(hurt, "prepared", partial(_of_cache, file), damage)
            yield Case("cache", file, fault, play)
    for place, fault, damage in MORE_OF_THE_CACHE:
        play = partial(hurt, "prepared", lambda place: place.cache, damage)
        yield Case("cache", place, fault, play, EXACT)
    for file, fault, damage, demands in RUN_FILES:
        play = partial(hurt, "halfway", partial(_of_run, file), damage)
        yield Case("run directory", file, fault, play, demands)


def _of_newest(file: str, place: Workplace) -> Path:
    return find(place.newest, file)


def _of_run(path: str, place: Workplace) -> Path:
    return place.run / path.format(newest=place.newest.name)


def _of_cache(file: str, place: Workplace) -> Path:
    """A file of the first block, or of the first domain."""
    kind, name = file.split("/")
    return find(place.cache, f"blocks/*/{name}" if kind == "block" else f"*/{name}")


def hurt(
    state: str,
    target: Callable[[Workplace], Path],
    damage: Damage,
    place: Workplace,
    arguments: Sequence[str] = (),
) -> Verdict:
    """Damages a file or a folder; taken back, it is as it was before."""
    place.begin(state)
    path, before = target(place), place.directory / "before"
    if path.is_dir():
        shutil.copytree(path, before)
    else:
        shutil.copyfile(path, before)
    damage(path)

    def undo() -> None:
        if before.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(before, path)
        else:
            shutil.copyfile(before, path)

    return judge_run(place, place.train(*arguments), undo)


def _flipped_parameters() -> Iterator[Case]:
    """A bit of the parameters is flipped, elsewhere than in the run that is resumed by default."""
    largest = partial(find, pattern="parameters/ocdbt.process_0/d/* largest")

    def of_newest(place: Workplace) -> Path:
        return largest(place.newest)

    def finished(place: Workplace) -> Path:
        return largest(place.run / "checkpoints" / str(place.lab.steps))

    def flip_all(checkpoints: Path) -> None:
        for step in checkpoints.iterdir():
            flip(largest(step))

    for place, state, target, damage, arguments, demands in (
        ("--strict-resume", "halfway", of_newest, flip, ["--strict-resume"], NAMED_STOP),
        ("newest of a finished run", "finished", finished, flip, [], EXACT),
        ("all", "halfway", lambda place: place.run / "checkpoints", flip_all, [], NAMED_STOP),
    ):  # fmt: skip
        play = partial(hurt, state, target, damage, arguments=arguments)
        yield Case("checkpoints", place, "a bit of the parameters flipped", play, demands)
