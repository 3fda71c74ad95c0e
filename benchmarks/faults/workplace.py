"""Where a case happens: a directory with sources, cache and run, and the command that trains there.

DIR/reference/   the run that nothing hurts; its results are what every other run must end with
DIR/cases/NAME/  samples/, cache/, run/, home/, tmp/ and config.yaml of one case
DIR/programs/    jax's compilation cache, shared by all
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import tensorstore

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "moi_jax" / "data" / "samples"
TRAP = Path(__file__).parent / "trap"

# Evaluated and saved four times. The prompts are no ASCII, and the answers are shown at the end.
CONFIG = """\
model: {{preset: tiny, remat: none}}
tokenizer: {{path: samples/tokenizer}}
data:
  root: samples
  cache_dir: cache
  sequence_length: 256
  max_repeats: 100
  domains:
    - {{name: chat, sources: [{{path: chat.jsonl, max_rows: 40}}]}}
    - name: maths
      prompt: "Σ: du bist Mathematiker."
      sources: [{{path: maths.jsonl, max_rows: 40}}]
optimizer: {{learning_rate: 1.0e-3}}
train:
  steps: {steps}
  global_batch_rows: 2
  sample_prompts: [{{domain: maths, prompt: "¿Cuánto es 3 × 4? 十二?"}}]
  sample_max_new_tokens: 4
eval: {{every: {every}}}
checkpoint: {{every: {every}, keep_last: 3, retry_seconds: {retry_seconds}}}
logging: {{run_dir: run, every: 1}}
"""
RETRY_SECONDS = 3  # two more tries of a save, where the default would wait for a minute
# What the keys that depend on the time of things begin with.
TIMINGS = (
    "tokens_per_second",
    "loss_tokens_per_second",
    "mfu",
    "peak_device_memory_bytes",
    "time/",
    "goodput",
    "written",
)


class Skip(Exception):
    """The case cannot be played here; the message says why."""


@dataclass(frozen=True)
class Trap:
    """A fault at a place within the process, see trap/sitecustomize.py.

    Attributes:
      event: an audit event, or "log".
      pattern: a regular expression for its arguments, or for the message.
      after: seconds from the event to the fault.
      signals: sent one after the other.
      fill: a file that is written until the disk is full.
    """

    event: str
    pattern: str
    after: float = 0.0
    signals: Sequence[int] = ()
    fill: str = ""


@dataclass(frozen=True)
class Done:
    """A command that has ended.

    Attributes:
      status: its exit status, -n if signal n ended it, None if it did not end in time.
      sprung: whether its trap, if it had one, sprang.
      lost: the files of checkpoints whose content is nowhere among the checkpoints any more.
      seconds: how long it was waited for.
    """

    status: int | None
    stdout: str
    stderr: str
    sprung: bool
    lost: Sequence[str] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Lab:
    """What all cases share.

    Attributes:
      directory: the DIR of the campaign.
      steps: the length of the runs, a multiple of 4.
      timeout: seconds after which a command counts as hanging.
      kind: the workplaces of the cases, on one host or on two.
    """

    directory: Path
    steps: int
    timeout: float
    kind: "type[Workplace]"

    @property
    def every(self) -> int:
        """Steps between two saves, and between two evaluations."""
        return self.steps // 4

    def prepare(self) -> None:
        """Runs the reference, unless it is there; exits if it fails."""
        whole = self.directory / "reference"
        if whole.exists():
            return
        place = self.place("reference.part")
        shutil.rmtree(place.directory, ignore_errors=True)
        place.begin("new")
        done = place.train()
        if done.status:
            sys.exit(f"the reference run ended with status {done.status}:\n{done.stderr}")
        place.directory.rename(whole)

    def reference(self) -> "Workplace":
        return self.place("reference")

    def place(self, name: str) -> "Workplace":
        return self.kind(self.directory / name, self)


class Workplace:
    """The directory of one case.

    Attributes:
      more_arguments, more_variables: of every command of the case.
    """

    XLA_FLAGS = "--xla_backend_optimization_level=0"

    def __init__(self, directory: Path, lab: Lab):
        self.directory, self.lab = directory.absolute(), lab
        self.run, self.cache = self.directory / "run", self.directory / "cache"
        self.samples = self.directory / "samples"
        self.more_arguments: list[str] = []
        self.more_variables: dict[str, str] = {}
        self._sprung = self.directory / "sprung"
        self._trapped = False  # whether the last command has a trap

    @property
    def newest(self) -> Path:
        """The newest checkpoint of a run that is halfway."""
        return self.run / "checkpoints" / str(3 * self.lab.every)

    def begin(self, state: str) -> None:
        """Lays out the case: a "new" run, one "prepared" up to its cache, "halfway" or "finished".

        Halfway the run is as if it had been killed while it wrote its last checkpoint.
        """
        for name in ("home", "tmp"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        shutil.copytree(SAMPLES, self.samples)
        (self.directory / "config.yaml").write_text(self.config(), encoding="utf-8")
        if state == "new":
            return
        whole = self.lab.reference()
        shutil.copytree(whole.cache, self.cache, dirs_exist_ok=True)
        if state == "prepared":
            return
        shutil.copytree(whole.run, self.run, dirs_exist_ok=True)
        if state == "halfway":
            shutil.rmtree(self.run / "checkpoints" / str(self.lab.steps))
            (self.run / "report.html").unlink()

    def config(self) -> str:
        return CONFIG.format(
            steps=self.lab.steps, every=self.lab.every, retry_seconds=RETRY_SECONDS
        )

    def start(
        self,
        *arguments: str,
        trap: Trap | None = None,
        environment: Mapping[str, str | None] | None = None,
        prefix: Sequence[str] = (),
        stdout: int | IO[bytes] = subprocess.PIPE,
        stderr: int | IO[bytes] = subprocess.PIPE,
    ) -> "subprocess.Popen[bytes]":
        """Starts python -m moi_jax.train; a variable of `environment` that is None is unset."""
        command = [sys.executable, "-m", "moi_jax.train", "--config", "config.yaml"]
        command += [*self.more_arguments, *arguments]
        variables = {**self._environment(trap), **(environment or {})}
        self._trapped = trap is not None
        return subprocess.Popen(
            [*prefix, *command],
            cwd=self.directory,
            env={name: value for name, value in variables.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )

    def finish(self, process: "subprocess.Popen[bytes]") -> Done:
        """Waits for the end of a command."""
        status: int | None
        try:
            out, err = process.communicate(timeout=self.lab.timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            status = None
        finally:
            process.kill()  # where the campaign itself was interrupted
        stdout, stderr = ((text or b"").decode(errors="replace") for text in (out, err))
        return Done(status, stdout, stderr, not self._trapped or self._sprung.exists())

    def train(self, *arguments: str, **options: Any) -> Done:
        """Runs the command to its end; for the options see `start`."""
        before = self._saved_files()
        done = self.finish(self.start(*arguments, **options))
        after = set(self._saved_files().values())
        lost = [name for name, digest in before.items() if digest not in after]
        return dataclasses.replace(done, lost=lost)

    def results(self) -> dict[str, str]:
        """The digests of what must be equal bit for bit at the end of a run."""
        step = self.run / "checkpoints" / str(self.lab.steps)
        parts = {
            "parameters": lambda: _arrays(step / "parameters"),
            "optimizer": lambda: _arrays(step / "optimizer"),
            "position": lambda: _position(step),
            "metrics": lambda: "\n".join(map(json.dumps, self.metrics())).encode(),
            "samples": lambda: (self.run / "samples.jsonl").read_bytes(),
        }
        digests = {}
        for name, content in parts.items():
            try:
                digests[name] = hashlib.sha256(content()).hexdigest()
            except (OSError, ValueError) as error:
                digests[name] = f"unreadable: {error}"
        return digests

    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what depends on the clock."""
        text = (self.run / "metrics.jsonl").read_text(encoding="utf-8")
        records = map(json.loads, text.splitlines())
        return [
            {k: v for k, v in record.items() if not k.startswith(TIMINGS)} for record in records
        ]

    @contextmanager
    def disk(self, name: str, size: str, **options: str) -> Iterator[None]:
        """Mounts an empty file system of its own at a folder of the case."""
        if "FAULTS_MAY_MOUNT" not in os.environ:
            raise Skip("needs mounts of its own (unshare)")
        folder = self.directory / name
        folder.mkdir(parents=True)
        listed = ",".join(f"{key}={value}" for key, value in {"size": size, **options}.items())
        subprocess.run(["mount", "-t", "tmpfs", "-o", listed, "tmpfs", folder], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)

    def remount(self, name: str, options: str = "size=1g,nr_inodes=0,rw") -> None:
        """Changes a mounted file system; by default it gets plenty of space."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.directory / name], check=True)

    def _saved_files(self) -> dict[str, str]:
        """The files of the run's checkpoints, with their digests."""
        return {
            str(path.relative_to(self.run)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (self.run / "checkpoints").rglob("*")
            if path.is_file()
        }

    def _environment(self, trap: Trap | None) -> dict[str, str]:
        values = {
            "JAX_COMPILATION_CACHE_DIR": str(self.lab.directory.absolute() / "programs"),
            **os.environ,
            "HOME": str(self.directory / "home"),
            "TMPDIR": str(self.directory / "tmp"),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": self.XLA_FLAGS,
            **self.more_variables,
        }
        if trap:
            values["PYTHONPATH"] = f"{TRAP}{os.pathsep}{ROOT}"
            values["FAULT_TRAP"] = json.dumps({**vars(trap), "sprung": str(self._sprung)})
        return values


def _position(step: Path) -> bytes:
    """The position of a step, without what it says of evaluations, which the metrics hold.

    If a signal cut them off, they are made after the step was saved.
    """
    position = json.loads((step / "position" / "metadata").read_text(encoding="utf-8"))
    kept = {key: position[key] for key in position.keys() - {"missed", "early_stopping"}}
    return json.dumps(kept, sort_keys=True).encode()


def _arrays(item: Path) -> bytes:
    """What an array item of a checkpoint holds, read without orbax and without moi_jax."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{item}/"}).result()
    return b"".join(key + store[key] for key in sorted(store.list().result()))
