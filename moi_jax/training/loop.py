"""The training loop, from the first evaluation to the last checkpoint."""

import contextlib
import json
import logging
from typing import Any

from moi_jax.common.retry import retried
from moi_jax.parallel import hosts
from moi_jax.training.run import Run, ShouldStop, is_due
from moi_jax.training.saves import complete_save, save, save_locally
from moi_jax.training.step_reader import StepReader

log = logging.getLogger(__name__)

EVALUATIONS = ("held_out", "benchmarks", "samples")  # the attributes of `Evaluations`


def fit(run: Run, should_stop: ShouldStop) -> None:
    """Trains to the end of the run, or to the step after which `should_stop` is true.

    It changes `run` in place; `run.finished` says whether the run reached its end.

    The order of the body matters. Each step is dispatched before the metrics of the previous one
    are read, so the device never waits for the host. An evaluation or a checkpoint uses the
    parameters only after the metrics of the step that made them were read: a run that must end
    because its steps are not finite ends there, and saves nothing.
    """
    config, reader = run.config, StepReader(run)
    with contextlib.closing(run.profiler), run.clock.part("step"):
        with reader.paused("evaluation"):
            _evaluate_first(run, should_stop)
        while not (run.at_end or run.missed):
            if run.profiler.starts_before(run.step + 1):
                reader.read_previous()
                complete_save(run)  # a save in the background is no part of a step
                run.profiler.start(run.step + 1)
            first_row = run.row
            with run.profiler.annotation(run.step + 1):
                with run.clock.part("data_wait"):
                    batch = next(run.batches)
                limit = run.loss_limit.before(run.step + 1)
                run.state, metrics = run.train_step(run.state, batch, limit)
            run.step += 1
            run.row = min(first_row + config.train.global_batch_rows, run.total_rows)
            reader.read_previous()
            reader.hold(run.step, first_row, run.row, metrics)
            if run.profiler.ends_after(run.step):
                reader.read_previous()
                with reader.paused("profile"):
                    run.profiler.close()

            last = run.step == run.steps
            every = {
                "held_out": config.eval.every,
                "benchmarks": config.eval.benchmarks.every,
                "samples": config.train.sample_every,
            }
            due = {name for name, steps in every.items() if last or is_due(run.step, steps)}
            losses: dict[str, float] = {}
            if due:
                reader.read_previous()
                with reader.paused("evaluation"):
                    losses = _evaluate(run, should_stop, due)
            stopping = should_stop()  # called once, so that a run that stops here has saved
            failure = run.checkpoints.failure()
            ending = run.at_end or stopping
            if ending or failure or is_due(run.step, config.checkpoint.every):
                reader.read_previous()
                reader.write_window()
                with reader.paused("checkpoint"):
                    save(run, losses, failure, complete=ending)
            elif run.local and is_due(run.step, config.checkpoint.local_every or 0):
                reader.read_previous()
                reader.write_window()
                with reader.paused("checkpoint"):
                    save_locally(run, run.local)
            if stopping:
                break


def _evaluate_first(run: Run, should_stop: ShouldStop) -> None:
    """Runs the evaluations that are due before the first step of this process.

    These are all of them at the start of a run, and those that were abandoned at the checkpoint. If
    one is abandoned again, the run takes no step, because a step would change the parameters.
    """
    if due := run.missed or (set(EVALUATIONS) if run.step == 0 else set()):
        _evaluate(run, should_stop, due)
    if (run.missed or run.at_end) and run.checkpoints.latest() != run.step:
        save(run, {}, complete=True)


def _evaluate(run: Run, should_stop: ShouldStop, due: set[str]) -> dict[str, float]:
    """Runs the evaluations that are due on the current parameters; returns the held-out losses.

    If these losses end the run by early stopping, the other evaluations are due too. If the run
    must stop, no evaluation starts, and a running one is abandoned: the checkpoint must not wait.
    `run.missed` then names what the resumed run makes up for.

    Args:
      due: names of EVALUATIONS.
    """
    parameters, evaluations, done = run.state.parameters, run.evaluations, set()
    losses: dict[str, float] = {}
    if "held_out" in due and evaluations.held_out:
        losses = evaluations.held_out(parameters, should_stop)
    if losses:
        done.add("held_out")
        run.early_stopping.count(losses)
        run.log.write({"step": run.step, **losses})
        shown = "  ".join(
            f"{name} {losses[f'eval/{name}/loss']:.3f} "
            f"({losses[f'eval/{name}/default_prompt/loss']:.3f})"
            for name in (*run.domains, "mean")
        )
        log.info("step %d/%d  held-out (default prompt)  %s", run.step, run.steps, shown)
    if run.early_stopping.ended:
        log.info("step %d/%d  the run stops early: %s", run.step, run.steps, run.early_stopping)
        due = set(EVALUATIONS)
    if "benchmarks" in due and evaluations.benchmarks:
        scores = evaluations.benchmarks(parameters, should_stop)
        if scores:
            done.add("benchmarks")
            run.log.write({"step": run.step, **scores})
            shown = "  ".join(f"{name} {score:.1f}" for name, score in scores.items())
            log.info("step %d/%d  %s", run.step, run.steps, shown)
    if "samples" in due and evaluations.samples and not should_stop():
        done.add("samples")
        answers = [{"step": run.step, **answer} for answer in evaluations.samples(parameters)]
        if hosts.is_main():
            _write_answers(run, answers)
    run.missed = {name for name in due - done if getattr(evaluations, name)}
    return losses


def _write_answers(run: Run, answers: list[dict[str, Any]]) -> None:
    """Adds the answers to samples.jsonl."""
    path = run.directory / "samples.jsonl"
    end = path.stat().st_size if path.exists() else 0

    def write() -> None:
        with path.open("ab") as file:
            file.truncate(end)  # what a try before it may have written
            file.write("".join(json.dumps(answer) + "\n" for answer in answers).encode())

    retried(path, run.config.checkpoint.retry_seconds, write)
