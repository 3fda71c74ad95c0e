"""Checks recorded held-out losses: they are measured again on the checkpoint of their step."""

import dataclasses

from moi_jax import config as config_lib
from moi_jax.checkpoints.experiment import Experiment
from moi_jax.checkpoints.parameters import read_parameters
from moi_jax.common.errors import UserError
from moi_jax.training.audit.finding import Finding, NotDone, passed
from moi_jax.training.audit.records import RESTORE, read_records
from moi_jax.training.audit.saved_run import PlannedRun, SavedRun
from moi_jax.training.train import MakeEvaluations


def check_held_out(
    run: SavedRun, data: PlannedRun, make_evaluations: MakeEvaluations | None
) -> Finding:
    """The held-out losses of the newest checkpoint that was evaluated are as recorded."""
    records = {record["step"]: record for record in read_records(run)}
    measured = [saved for saved in run.steps if "eval/mean/loss" in records.get(saved.step, {})]
    if not measured or make_evaluations is None:
        raise NotDone("no checkpoint that is kept was evaluated on held-out conversations")
    saved = measured[0]
    experiment = _without_benchmarks(run)
    dataset = dataclasses.replace(data.dataset, config=experiment.config)
    evaluations = make_evaluations(experiment, dataset, run.bind, run.mesh, run.directory)
    assert evaluations.held_out is not None
    dtype = run.config.param_dtype
    parameters = read_parameters(
        saved.path, experiment.model, dtype, run.mesh, verify=False, base=run.base
    )
    worst = 0.0
    for key, loss in evaluations.held_out(parameters, lambda: False).items():
        recorded = records[saved.step].get(key)
        if recorded is None:
            if loss == loss:  # NaN is recorded as null
                raise UserError(f"metrics.jsonl, step {saved.step}: {key} is missing; {RESTORE}")
            continue
        worst = max(worst, abs(recorded - loss))
        if not worst <= run.loss_bar:
            raise UserError(
                f"metrics.jsonl, step {saved.step}: {key} is {recorded}, and measured again it is "
                f"{loss}; {RESTORE}"
            )
    return passed(
        f"the held-out losses of step {saved.step} are measured again within {worst:.1e} nats "
        f"(bar {run.loss_bar:g})",
        step=saved.step,
        worst=worst,
        bar=run.loss_bar,
    )


def _without_benchmarks(run: SavedRun) -> Experiment:
    """The experiment without benchmarks and sample answers, which need other data."""
    config = run.config
    config = config.model_copy(
        update={
            "eval": config.eval.model_copy(update={"benchmarks": config_lib.Benchmarks()}),
            "train": config.train.model_copy(update={"sample_prompts": ()}),
        }
    )
    return dataclasses.replace(run.experiment, config=config)
