"""Whether a run may go on, and from where: its config, its data and its plan are still the same."""

import logging
from pathlib import Path
from typing import Any

from moi_jax.checkpoints.experiment import Experiment
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.common.errors import UserError
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.config import Config
from moi_jax.config.load import load_config
from moi_jax.data.dataset import Dataset
from moi_jax.data.planning.training_plan import TrainingPlan

log = logging.getLogger(__name__)

# Where a run without a checkpoint begins.
FIRST_POSITION: dict[str, Any] = {
    "step": 0,
    "row": 0,
    "epoch_rows": [0],
    "skipped_in_a_row": 0,
    "early_stopping": {},
}

# Keys, or beginnings of keys, that may differ when a run goes on. Everything else may not: the
# run would no longer be the one that was begun.
MAY_CHANGE = (
    "data.cache_dir",
    "data.max_repeats",
    "data.on_bad_row",
    "data.root",
    "data.workers",
    "checkpoint",
    "eval",
    "logging",
    "mesh",
    "model.remat",
    "tokenizer.path",
    "train.deterministic",
    "train.microbatch_rows",
    "train.profile_steps",
    "train.sample_every",
    "train.sample_max_new_tokens",
    "train.sample_prompts",
)
# Of a source: its content is compared, not where it lies.
SOURCE_MAY_CHANGE = (".path", ".manual_dir", ".license")
MAY_CHANGE_IF_ALLOWED = (
    "optimizer",
    "train.early_stopping_patience",
    "train.epochs",
    "train.global_batch_rows",
    "train.loss_tokens",
    "train.steps",
)


def resume_position(
    checkpoints: RunCheckpoints,
    saved_step: int | None,
    experiment: Experiment,
    dataset: Dataset,
    allow_change: bool,
) -> dict[str, Any]:
    """Where the run goes on, once it is known to be the same run.

    Raises:
      UserError: the run there is another one.
    """
    directory = checkpoints.directory.parent
    if saved_step is None:
        if (directory / "config.yaml").exists():  # killed before its first checkpoint
            before = load_config(directory / "config.yaml").model_dump(mode="json")
            check_resume(directory, before, experiment.config, allow_change)
        return FIRST_POSITION
    read_items(checkpoints.directory / str(saved_step))  # refuses another format in one line
    before = checkpoints.read_json(saved_step, "config")
    # Its own checkpoint holds all that was taken from the base.
    may_change = (*MAY_CHANGE, "model.init_from")
    check_resume(directory, before, experiment.config, allow_change, may_change)
    position = checkpoints.read_json(saved_step, "position")
    check_fingerprints(directory, position["fingerprints"], fingerprints(experiment, dataset))
    return position


def resume_plan(dataset: Dataset, position: dict[str, Any], directory: Path) -> TrainingPlan:
    """The plan of the run from its position on.

    Raises:
      UserError: the epoch was planned otherwise, or the run is beyond its end.
    """
    config, step, row = dataset.config, position["step"], position["row"]
    plan = TrainingPlan(
        dataset.corpus, config.data, config.train, position["epoch_rows"], step, row
    )
    if step:
        now = {"the epoch's plan": _plan_fingerprint(plan, row)}
        check_fingerprints(directory, {"the epoch's plan": position["plan"]}, now)
    if plan.total_steps < step:
        raise UserError(
            f"{directory} stands at step {step}, past the {plan.total_steps} steps that train now "
            f"asks for; ask for more, or --fresh to begin anew"
        )
    return plan


def saved_position(
    experiment: Experiment, dataset: Dataset, plan: TrainingPlan, row: int
) -> dict[str, Any]:
    """What a checkpoint keeps of the data when `row` is the first row of the next batch."""
    return {
        "row": row,
        "epoch_rows": plan.epoch_first_rows(max(row - 1, 0)),
        "plan": _plan_fingerprint(plan, row),
        "fingerprints": fingerprints(experiment, dataset),
    }


def fingerprints(experiment: Experiment, dataset: Dataset) -> dict[str, str]:
    """Of what must not change while a run goes on, though its path may."""
    prompts = experiment.items.prompts
    return {
        "model": json_fingerprint(experiment.model.to_json()),
        "tokenizer": experiment.tokenizer.fingerprint,
        "template": prompts["template_hash"],
        "prompts": json_fingerprint([prompts["default_system_prompt"], prompts["domains"]]),
        "data": dataset.fingerprint,
    }


def _plan_fingerprint(plan: TrainingPlan, row: int) -> str:
    """Of the plan of the epoch that the last row before `row` lies in."""
    return plan.epoch_plan(plan.locate(max(row - 1, 0))[0]).fingerprint


def check_resume(
    run_dir: Path,
    before: dict[str, Any],
    config: Config,
    allow_change: bool,
    may_change: tuple[str, ...] = MAY_CHANGE,
) -> None:
    """Compares the config a run was begun with, `before`, with the one to go on with.

    Raises:
      UserError: a difference that would make it another run; the first one is named.
    """
    old_values, new_values = _flat(before), _flat(config.model_dump(mode="json"))
    for key in sorted(old_values.keys() | new_values.keys()):
        old, new = old_values.get(key), new_values.get(key)
        if old == new:
            continue
        change = f"{key}: {old} -> {new}"
        of_source = key.startswith("data.domains.") and key.endswith(SOURCE_MAY_CHANGE)
        if key.startswith(may_change) or of_source:
            log.info("going on with %s", change)
        elif not key.startswith(MAY_CHANGE_IF_ALLOWED):
            raise UserError(
                f"{run_dir} was begun with another setting, {change}; restore it, or --fresh to "
                f"begin anew (the old run is moved aside)"
            )
        elif not allow_change:
            raise UserError(
                f"{run_dir} was begun with {change}; --allow-change goes on with the new one"
            )
        else:
            log.info("going on with %s (allowed)", change)


def check_fingerprints(run_dir: Path, saved: dict[str, str], current: dict[str, str]) -> None:
    """Raises UserError when tokenizer, template, prompts or data content differ from the run's."""
    for what, now in current.items():
        if saved.get(what) != now:
            raise UserError(
                f"{run_dir} was begun with another content of {what} (fingerprint "
                f"{saved.get(what)}, now {now}); restore it, or --fresh to begin anew"
            )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b.0": 1}"""
    if isinstance(values, dict):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values:
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
