"""The training loop, from the first evaluation to the last checkpoint."""

import contextlib
import json
import logging

from moi_jax.training.run import Run, ShouldStop, is_due
from moi_jax.training.step_reader import StepReader

log = logging.getLogger(__name__)


def fit(run: Run, should_stop: ShouldStop) -> None:
    """Trains to the end of the run, or to the step after which `should_stop` is true.

    It changes `run` in place; `run.finished` says whether the run reached its end.

    The order of the body matters. Each step is dispatched before the metrics of the previous one
    are read, so the device never waits for the host. An evaluation or a checkpoint uses the
    parameters only after the metrics of the step that made them were read: a run that must end
    because its steps are not finite ends there, and saves nothing.
    """
    config, reader = run.config, StepReader(run)
    with contextlib.closing(run.log), contextlib.closing(run.profiler):
        with reader.paused():
            _evaluate_first(run, should_stop)
        while not run.finished and not run.early_stopping.missed_evaluation:
            if run.profiler.starts_before(run.step + 1):
                reader.read_previous()
                run.profiler.start(run.step + 1)
            first_row = run.row
            with run.profiler.annotation(run.step + 1):
                run.state, metrics = run.train_step(run.state, next(run.batches))
            run.step += 1
            run.row = min(first_row + config.train.global_batch_rows, run.total_rows)
            reader.read_previous()
            reader.hold(run.step, first_row, run.row, metrics)
            run.checkpoints.check()
            if run.profiler.ends_after(run.step):
                reader.read_previous()
                with reader.paused():
                    run.profiler.close()

            last = run.step == run.steps
            due = {
                "held_out": last or is_due(run.step, config.eval.every),
                "benchmarks": last or is_due(run.step, config.eval.benchmarks.every),
                "samples": last or is_due(run.step, config.train.sample_every),
            }
            losses: dict[str, float] = {}
            if any(due.values()):
                reader.read_previous()
                with reader.paused():
                    losses = _evaluate(run, should_stop, **due)
            stopping = should_stop()  # called once, so that a run that stops here has saved
            if run.finished or stopping or is_due(run.step, config.checkpoint.every):
                reader.read_previous()
                reader.write_window()
                with reader.paused():
                    _save(run, losses)
            if stopping:
                break


def _evaluate_first(run: Run, should_stop: ShouldStop) -> None:
    """Runs the evaluations that are due before the first step of this process.

    With early stopping it also repeats an evaluation that was abandoned. If this one is abandoned
    too, the run saves and takes no step, because a step would change the counted parameters.
    """
    start = run.step == 0
    if start or run.early_stopping.missed_evaluation:
        _evaluate(run, should_stop, held_out=True, benchmarks=start, samples=start)
    if run.early_stopping.missed_evaluation and run.checkpoints.latest() != run.step:
        _save(run, {})


def _evaluate(
    run: Run, should_stop: ShouldStop, *, held_out: bool, benchmarks: bool, samples: bool
) -> dict[str, float]:
    """Runs the evaluations that are due on the current parameters; returns the held-out losses.

    If these losses end the run by early stopping, the other evaluations are due too. If the run
    must stop, no evaluation starts, and a running one is abandoned: the checkpoint must not wait.
    """
    parameters, evaluations = run.state.parameters, run.evaluations
    losses: dict[str, float] = {}
    if held_out and evaluations.held_out:
        losses = evaluations.held_out(parameters, should_stop)
        run.early_stopping.count(losses)
    if losses:
        run.log.write({"step": run.step, **losses})
        shown = "  ".join(
            f"{name} {losses[f'eval/{name}/loss']:.3f} "
            f"({losses[f'eval/{name}/default_prompt/loss']:.3f})"
            for name in (*run.domains, "mean")
        )
        log.info("step %d/%d  held-out (default prompt)  %s", run.step, run.steps, shown)
    ended = run.early_stopping.ended
    if ended:
        log.info("step %d/%d  the run stops early: %s", run.step, run.steps, run.early_stopping)
    if (benchmarks or ended) and evaluations.benchmarks:
        scores = evaluations.benchmarks(parameters, should_stop)
        if scores:
            run.log.write({"step": run.step, **scores})
            shown = "  ".join(f"{name} {score:.1f}" for name, score in scores.items())
            log.info("step %d/%d  %s", run.step, run.steps, shown)
    if (samples or ended) and evaluations.samples and not should_stop():
        answers = [{"step": run.step, **answer} for answer in evaluations.samples(parameters)]
        with (run.directory / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer) + "\n" for answer in answers)
    return losses


def _save(run: Run, losses: dict[str, float]) -> None:
    """Saves a checkpoint; `losses` are the held-out losses of this step, or {}."""
    position = {
        "step": run.step,
        "skipped_in_a_row": run.skipped_in_a_row,
        "early_stopping": run.early_stopping.to_json(),
        **run.position(run.row),
    }
    config = run.config.model_dump(mode="json")
    run.checkpoints.save(run.step, *run.state.items(), position, config, losses)
