"""Resuming a run: checks that config, data and plan are the same, and finds the position."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from moi_jax.checkpoints.experiment import Experiment
from moi_jax.common.errors import UserError
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.config import Config
from moi_jax.config.files import merge
from moi_jax.config.load import load_config, make_config
from moi_jax.data.dataset import Dataset
from moi_jax.data.planning.epoch import PLANNER
from moi_jax.data.planning.training_plan import TrainingPlan
from moi_jax.training.saved import Saved
from moi_jax.training.versions import versions

log = logging.getLogger(__name__)

# The position of a run without a checkpoint.
FIRST_POSITION: dict[str, Any] = {
    "step": 0,
    "row": 0,
    "epoch_rows": [0],
    "skipped_in_a_row": 0,
    "early_stopping": {},
    "missed": [],
    "unchanged_since": 0,
}

# Keys, or prefixes of keys, that may differ when a run is resumed. All other keys must stay, or
# it would be another run.
MAY_CHANGE = (
    "data.cache_dir",
    "data.max_repeats",
    "data.max_unplaceable",
    "data.on_bad_row",
    "data.root",
    "data.workers",
    "checkpoint",
    "cluster",
    "eval",
    "logging",
    "mesh",
    "model.attention",
    "model.remat",
    "model.splash_blocks",
    "tokenizer.chat_template",
    "tokenizer.path",
    "train.compilation_cache",
    "train.deterministic",
    "train.max_skipped_in_a_row",
    "train.microbatch_rows",
    "train.on_spike",
    "train.profile_steps",
    "train.sample_every",
    "train.sample_max_new_tokens",
    "train.sample_prompts",
)
# Keys of a source that may differ: its content is compared, not its place.
SOURCE_MAY_CHANGE = (".path", ".manual_dir", ".license")
# The state of another optimizer, or of other parameters, is another tree.
NEVER = ("optimizer.name", "optimizer.frozen", "optimizer.ema_decay")
MAY_CHANGE_IF_ALLOWED = (
    "optimizer",
    "train.early_stopping_patience",
    "train.epochs",
    "train.global_batch_rows",
    "train.loss_tokens",
    "train.max_loss_ratio",
    "train.steps",
)


def resume_position(
    directory: Path,
    saved: Saved | None,
    experiment: Experiment,
    dataset: Dataset,
    allow_change: bool,
) -> dict[str, Any]:
    """Checks that this is still the same run, and returns the position from which it resumes.

    Args:
      directory: of the run.

    Raises:
      UserError: the directory holds another run.
    """
    if saved is None:
        if (directory / "config.yaml").exists():  # killed before its first checkpoint
            before = load_config(directory / "config.yaml").model_dump(mode="json")
            check_resume(directory, before, experiment.config, allow_change)
        return FIRST_POSITION
    position = saved.position
    _check_planner(position, directory)
    # The checkpoint holds everything that came from model.init_from.
    may_change = (*MAY_CHANGE, "model.init_from")
    if check_resume(directory, saved.config, experiment.config, allow_change, may_change):
        position = {**position, "unchanged_since": saved.step}
    check_fingerprints(directory, position["fingerprints"], fingerprints(experiment, dataset))
    return position


def resume_plan(dataset: Dataset, position: dict[str, Any], directory: Path) -> TrainingPlan:
    """Makes the plan of the run from its position on.

    Raises:
      UserError: the plan of the epoch differs from the saved one, or the run is past its end.
    """
    config, step, row = dataset.config, position["step"], position["row"]
    plan = TrainingPlan(
        dataset.corpus, config.data, config.train, position["epoch_rows"], step, row
    )
    if step:
        now = {"the epoch's plan": plan_fingerprint(plan, row)}
        check_fingerprints(directory, {"the epoch's plan": position["plan"]}, now)
    if plan.total_steps < step:
        raise UserError(
            f"{directory} is at step {step}, past the {plan.total_steps} steps of the config; set "
            f"more (train.steps, epochs or loss_tokens), or use --fresh to start over"
        )
    return plan


def saved_position(
    experiment: Experiment, dataset: Dataset, plan: TrainingPlan, mesh: Mesh, row: int
) -> dict[str, Any]:
    """Returns the data position for a checkpoint; `row` is the first row of the next batch.

    `sources` and `versions` are for an audit. No resume depends on them.
    """
    return {
        "row": row,
        "epoch_rows": plan.epoch_first_rows(max(row - 1, 0)),
        "plan": plan_fingerprint(plan, row),
        "planner": PLANNER,
        "fingerprints": fingerprints(experiment, dataset),
        "sources": dataset.sources,
        "versions": versions(mesh),
    }


def fingerprints(experiment: Experiment, dataset: Dataset) -> dict[str, str]:
    """Returns the fingerprints of the content that must not change in a resumed run."""
    prompts = experiment.items.prompts
    return {
        "model": json_fingerprint(experiment.model.to_json()),
        "tokenizer": experiment.tokenizer.fingerprint,
        "template": prompts["template_hash"],
        "prompts": json_fingerprint([prompts["default_system_prompt"], prompts["domains"]]),
        "data": dataset.fingerprint,
    }


def _check_planner(position: dict[str, Any], directory: Path) -> None:
    """Raises UserError if another planner planned the rows up to the position."""
    if (planner := position.get("planner", 1)) != PLANNER:
        raise UserError(
            f"the rows of {directory} were planned by planner {planner}, and this version has "
            f"planner {PLANNER}, which plans others; resume with the version of moi_jax that "
            f"started the run, or use --fresh to start over"
        )


def plan_fingerprint(plan: TrainingPlan, row: int) -> str:
    """Returns the fingerprint of the plan of the epoch that holds the last row before `row`."""
    return plan.epoch_plan(plan.locate(max(row - 1, 0))[0]).fingerprint


def check_resume(
    run_dir: Path,
    before: dict[str, Any],
    config: Config,
    allow_change: bool,
    may_change: tuple[str, ...] = MAY_CHANGE,
) -> bool:
    """Compares `before`, the config with which a run was started, with the config of now.

    Returns:
      Whether they differ in what only `allow_change` allows.

    Raises:
      UserError: a difference makes it another run. The message names the first one.
    """
    allowed = False
    for change, may in config_changes(before, config.model_dump(mode="json"), may_change):
        if may == "always":
            log.info("resuming with %s", change)
        elif may == "never":
            raise UserError(
                f"{run_dir} was started with another setting ({change}); restore it, or use "
                f"--fresh to start over (the old run is moved aside)"
            )
        elif not allow_change:
            raise UserError(
                f"{run_dir} was started with {change}; --allow-change resumes with the new value"
            )
        else:
            log.info("resuming with %s (allowed)", change)
            allowed = True
    return allowed


def config_changes(
    before: dict[str, Any], now: dict[str, Any], may_change: tuple[str, ...] = MAY_CHANGE
) -> Iterator[tuple[str, Literal["always", "if allowed", "never"]]]:
    """Yields each difference as "key: old -> new", and when a resumed run may have it.

    A setting that did not exist when `before` was saved had the effect of today's default.
    """
    before = merge(make_config({}).model_dump(mode="json"), before)
    for change in different(before, now):
        key = change.partition(":")[0]
        of_source = key.startswith("data.domains.") and key.endswith(SOURCE_MAY_CHANGE)
        if key.startswith(may_change) or of_source:
            yield change, "always"
        elif key.startswith(MAY_CHANGE_IF_ALLOWED) and not key.startswith(NEVER):
            yield change, "if allowed"
        else:
            yield change, "never"


def different(before: Any, now: Any) -> Iterator[str]:
    """Yields each difference of two nested JSON values as "key: old -> new", by key."""
    old, new = flat_settings(before), flat_settings(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key)} -> {new.get(key)}"


def check_fingerprints(run_dir: Path, saved: dict[str, str], current: dict[str, str]) -> None:
    """Raises UserError if a fingerprint differs from the saved one."""
    for what, now in current.items():
        if saved.get(what) != now:
            raise UserError(
                f"the content of {what} has changed since {run_dir} was started (fingerprint "
                f"{saved.get(what)}, now {now}); restore it, or use --fresh to start over"
            )


def flat_settings(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested values: {"a": {"b": [1]}} -> {"a.b.0": 1}."""
    if isinstance(values, dict):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values:
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flat_settings(value, f"{prefix}.{key}" if prefix else key)
    return flat
