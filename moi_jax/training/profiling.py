"""Profiling: a trace of a few steps of a run, for TensorBoard and XProf."""

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)


class StepProfiler:
    """Writes a jax.profiler trace of the steps in train.profile_steps to a directory."""

    def __init__(self, steps: tuple[int, int] | None, total_steps: int, directory: Path):
        """
        Args:
          steps: the first and the last step of the trace, counted from 1; None traces nothing.
          total_steps: the number of steps of the run.
        """
        if steps and steps[0] > total_steps:
            log.warning(
                "train.profile_steps begins with step %d, but the run ends with step %d; no step "
                "is profiled",
                steps[0], total_steps,
            )  # fmt: skip
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._directory = directory
        self._started_at: int | None = None  # the first step of the running trace
        self._last_step = 0

    def starts_before(self, step: int) -> bool:
        """Returns whether the trace starts now, before `step` is dispatched.

        A run that is resumed within the range traces the rest of the range.
        """
        return self._started_at is None and step in self._steps

    def start(self, step: int) -> None:
        """Starts the trace with `step`; the device must have finished the steps before it."""
        self._started_at = step
        jax.profiler.start_trace(self._directory)

    def annotation(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Returns a context for the dispatch of a step; it marks the step in the trace."""
        self._last_step = step
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def ends_after(self, step: int) -> bool:
        """Returns whether the trace ends now, once the device has finished `step`."""
        return self._started_at is not None and step == self._steps.stop - 1

    def close(self) -> None:
        """Ends and writes the running trace, if there is one."""
        if self._started_at is None:
            return
        jax.profiler.stop_trace()
        log.info(
            "profiled steps %d to %d in %s; open it with tensorboard --logdir",
            self._started_at, self._last_step, self._directory,
        )  # fmt: skip
        self._started_at = None
