"""A run as its checkpoints tell it: opened to be read, while it may still be training."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moi_jax import config as config_lib
from moi_jax.checkpoints.damage import DamagedCheckpoint, cannot_read
from moi_jax.checkpoints.damaged_steps import check_step
from moi_jax.checkpoints.experiment import Experiment
from moi_jax.checkpoints.init_from import chosen_base
from moi_jax.checkpoints.items import all_steps, read_base, read_items, read_json_item
from moi_jax.checkpoints.parameters import read_beside, read_held_state
from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.config import Config
from moi_jax.config.load import apply_override, make_config
from moi_jax.data.dataset import Dataset
from moi_jax.data.planning.training_plan import TrainingPlan
from moi_jax.models.compute import make_compute
from moi_jax.models.decoder import Bind, make_model
from moi_jax.parallel.context import check_sequence
from moi_jax.parallel.mesh import make_mesh
from moi_jax.parallel.placing import check_rows
from moi_jax.text.prompts import saved_template
from moi_jax.text.tokenizer import Tokenizer
from moi_jax.training.audit.finding import Finding, failed, passed
from moi_jax.training.optimizer import make_optimizer
from moi_jax.training.resume import config_changes
from moi_jax.training.state import abstract_state

Json = dict[str, Any]
RECORDS = ("config.yaml", "mixture.json", "metrics.jsonl")

# The largest difference of losses that are computed in another way, in nats; see docs/design.md.
LOSS_BARS = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 1e-3}


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """A sound checkpoint of a run.

    Attributes:
      position: where the run stood in its data, see `training.resume`.
      sums: its checksum file; empty in a checkpoint of a version that wrote none.
    """

    path: Path
    position: Json
    config: Config
    sums: bytes

    @property
    def step(self) -> int:
        return int(self.path.name)


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run as its newest sound checkpoint describes it.

    Attributes:
      steps: the sound checkpoints, the newest first.
      records: the files of RECORDS that are there, read once: what is checked is what is signed.
      experiment: of the newest one, all from its own items.
      base: the checkpoint with the base of adapters; None for the recorded ones.
      mesh: that of the run if these devices allow it.
      bind: parameters -> model, on the mesh.
      unchanged_since: the step since which optimizer, batch and length are those of the newest
        checkpoint.
    """

    directory: Path
    steps: list[SavedStep]
    records: dict[str, bytes]
    experiment: Experiment
    base: Path | None
    mesh: Mesh
    bind: Bind
    microbatch_rows: int
    unchanged_since: int

    @property
    def newest(self) -> SavedStep:
        return self.steps[0]

    @property
    def config(self) -> Config:
        return self.experiment.config

    @property
    def loss_bar(self) -> float:
        """How far a loss that is computed again in another way may lie from the first."""
        return LOSS_BARS[self.config.model.compute_dtype]


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """The data of a saved run, and its plan from the first row on."""

    dataset: Dataset
    plan: TrainingPlan


def find_run(run: Path) -> Path:
    """The directory of a run with a checkpoint.

    Raises:
      UserError: there is none.
    """
    directory = expand_home(run)
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{run} is no run: it has no config.yaml; name the directory of a run")
    if not all_steps(directory / "checkpoints"):
        raise UserError(f"{run} has no checkpoint yet, so there is nothing to audit; train first")
    return directory


def was_deterministic(directory: Path) -> bool:
    """Whether train.deterministic is set in the newest checkpoint whose config can be read."""
    for path in all_steps(directory / "checkpoints"):
        try:
            config = make_config(read_json_item(path, "config"), where=str(path))
            return config.train.deterministic
        except UserError:
            continue  # the check of the checkpoints tells it
    return False


def check_checkpoints(directory: Path) -> Finding:
    """Checks all files of every checkpoint against its checksums; the value is the sound steps."""
    sound: list[SavedStep] = []
    damaged: list[str] = []
    while not (sound or damaged):  # a run that goes on may delete all that were listed
        paths = all_steps(directory / "checkpoints")
        if not paths:
            raise UserError(f"{directory} has no checkpoint any more; audit again when it has one")
        for path in paths:
            try:
                sound.append(_read_step(path))
            except UserError as error:
                if path.exists():
                    damaged.append(str(error))
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        return failed(damaged[0] + more, sound or None, damaged=damaged)
    numbers = [saved.step for saved in sound]
    files = sum(saved.sums.count(b"\n") for saved in sound)
    text = f"steps {', '.join(map(str, numbers))}: {files:,} files are as they were written"
    return passed(text, sound or None, steps=numbers, files=files)


def _read_step(path: Path) -> SavedStep:
    """Checks and reads one checkpoint; raises UserError where it is not sound."""
    try:
        sums = (path / SUMS).read_bytes() if (path / SUMS).exists() else b""
    except OSError as error:
        raise cannot_read(path, error) from None
    check_step(path, arrays=True)
    config = make_config(read_json_item(path, "config"), where=str(path))
    position = read_json_item(path, "position")
    if str(position["step"]) != path.name:
        raise DamagedCheckpoint(path, f"its position is that of step {position['step']}")
    return SavedStep(path, position, config, sums)


def open_run(
    directory: Path,
    steps: list[SavedStep],
    devices: Sequence[jax.Device],
    overrides: Sequence[str] = (),
    base: Path | None = None,
) -> SavedRun:
    """Opens a run from its sound checkpoints.

    Args:
      overrides: settings, as `section.key=value`, that may differ in a resumed run, such as paths.
      base: of a run of adapters, see `moi_jax.load`.

    Raises:
      UserError: an override would make it another run, the mesh does not fit the devices, or this
        version cannot render the run's chat template; a record cannot be read, or there is no such
        base.
    """
    newest = steps[0]
    items = read_items(newest.path)
    template = saved_template(items.prompts, newest.path)
    tokenizer = Tokenizer.from_files(items.tokenizer, template)
    config = _overridden(newest.config, overrides)
    experiment = Experiment(config, items.model, tokenizer, None)
    experiment = experiment.on_platform(devices[0].platform)
    config = experiment.config
    mesh = _mesh(newest, config, devices)
    rows = config.train.microbatch_rows or config.train.global_batch_rows
    check_rows(rows, mesh, "the microbatch of the run,")
    check_sequence(config.data.sequence_length, mesh, "data.sequence_length")
    compute = make_compute(config.model, items.model, devices[0], mesh)
    return SavedRun(
        directory=directory,
        steps=steps,
        records=read_files(directory),
        experiment=experiment,
        base=chosen_base(newest.path, items, base),
        mesh=mesh,
        bind=make_model(items.model, compute),
        microbatch_rows=rows,
        unchanged_since=_unchanged_since(steps),
    )


def read_files(directory: Path) -> dict[str, bytes]:
    """The files of RECORDS that a run has, by name; raises UserError where one cannot be read."""
    paths = [directory / name for name in RECORDS]
    try:
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; get read access to it"
        ) from None


def check_finite_values(run: SavedRun) -> Finding:
    """All values of all sound checkpoints are finite."""
    model, dtype = run.experiment.model, run.config.param_dtype
    optimizer = make_optimizer(run.config.optimizer, model)
    abstract = abstract_state(model, optimizer, dtype, run.mesh).items()
    bases = {}
    for saved in reversed(run.steps):  # reading refuses a value that is not finite
        read_held_state(saved.path, model, *abstract)
        if recorded := read_base(saved.path):
            bases[recorded.fingerprint] = (saved.path, recorded)
    for step, recorded in bases.values():
        read_beside(step, recorded, model, abstract[0], verify=False, given=run.base)
    values = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    text = (
        f"{values:,} values of parameters and optimizer are finite in {len(run.steps)} checkpoints"
    )
    return passed(text, values=values)


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    before = config.model_dump(mode="json")
    values = config.model_dump(mode="json")
    for override in overrides:
        apply_override(values, override)
    changed = make_config(values, where="the config of the run")
    for change, may in config_changes(before, changed.model_dump(mode="json")):
        if may != "always":
            raise UserError(
                f"{change} would make it another run; override only settings that may differ in a "
                f"resumed run, such as data.root or mesh (docs/training.md)"
            )
    return changed


def _mesh(newest: SavedStep, config: Config, devices: Sequence[jax.Device]) -> Mesh:
    """The recorded mesh if it fits and no other one is asked for, else that of the config."""
    recorded = newest.position.get("versions", {}).get("mesh")
    if recorded and config.mesh == newest.config.mesh:
        try:
            return make_mesh(config_lib.Mesh(**recorded), devices)
        except UserError:
            pass  # there are fewer devices here
    return make_mesh(config.mesh, devices)


def _unchanged_since(steps: list[SavedStep]) -> int:
    """The step that the newest checkpoint records, or else as far as the checkpoints tell."""
    recorded = steps[0].position.get("unchanged_since")
    if recorded is not None:
        return recorded
    newest = steps[0].config.model_dump(mode="json")
    for saved in steps[1:]:
        changes = config_changes(saved.config.model_dump(mode="json"), newest)
        if any(may == "if allowed" for _, may in changes):
            return saved.step
    return 0
