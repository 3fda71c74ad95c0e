"""Profiling: a trace of a few steps of a run, which TensorBoard and XProf open."""

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)


class StepProfiler:
    """Writes a jax.profiler trace of the steps of train.profile_steps into a directory."""

    def __init__(self, steps: tuple[int, int] | None, total_steps: int, directory: Path):
        """
        Args:
          steps: the first and the last step to trace, counted from 1; None traces nothing.
          total_steps: of the run.
        """
        if steps and steps[0] > total_steps:
            log.warning(
                "train.profile_steps begins with step %d, but the run ends with step %d; nothing "
                "will be profiled",
                steps[0], total_steps,
            )  # fmt: skip
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._directory = directory
        self._started_at: int | None = None  # the first step of the trace under way
        self._last_step = 0

    def starts_before(self, step: int) -> bool:
        """Whether the trace starts now, before `step` is dispatched.

        A run that goes on from within the range traces what is left of it.
        """
        return self._started_at is None and step in self._steps

    def start(self, step: int) -> None:
        """Starts the trace with `step`; the device must be done with the steps before it."""
        self._started_at = step
        jax.profiler.start_trace(self._directory)

    def annotation(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Around the dispatch of a step: a trace then shows where the step begins and ends."""
        self._last_step = step
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def ends_after(self, step: int) -> bool:
        """Whether the trace ends now, once the device is done with `step`."""
        return self._started_at is not None and step == self._steps.stop - 1

    def close(self) -> None:
        """Writes the trace under way, if there is one."""
        if self._started_at is None:
            return
        jax.profiler.stop_trace()
        log.info(
            "steps %d to %d are profiled in %s; tensorboard --logdir shows it",
            self._started_at, self._last_step, self._directory,
        )  # fmt: skip
        self._started_at = None
