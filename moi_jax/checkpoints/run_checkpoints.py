"""The checkpoints of a run: saved in the background; the newest and the best are kept."""

import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy
from orbax.checkpoint.path import atomicity

from moi_jax import config as config_lib
from moi_jax.checkpoints.checksums import write_checksums
from moi_jax.checkpoints.damage import forget_cut_off, reading
from moi_jax.checkpoints.finite import check_finite
from moi_jax.checkpoints.items import Json, ModelItems, newest_step, read_base
from moi_jax.checkpoints.joined_saves import Manager
from moi_jax.checkpoints.parameter_files import save_args
from moi_jax.common.errors import UserError, is_full, reason
from moi_jax.common.retry import may_pass
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import adapters_of
from moi_jax.parallel import hosts
from moi_jax.parallel.shared_work import FailedElsewhere


class ChecksummedPath(atomicity.AtomicRenameTemporaryPath):
    """The temporary path of a step, which gets its name once its checksums are written.

    orbax commits a step by renaming it. Here it renames the step to another temporary name, so
    that the checksums cover the files of its commit, too. A process that is killed at any point
    leaves a whole step, or a temporary one that the next manager deletes.
    """

    def __init__(self, temporary_path: epath.Path, final_path: epath.Path, **options: Any):
        committed = temporary_path.with_name(f"{temporary_path.name}-committed")
        super().__init__(temporary_path, committed, **options)
        self._step = final_path

    @classmethod
    def from_final(
        cls, final_path: epath.Path, **options: Any
    ) -> atomicity.AtomicRenameTemporaryPath:
        """The temporary path of a step, or of an item, which the step's checksums cover."""
        if atomicity.TMP_DIR_SUFFIX in final_path.parent.name:
            return atomicity.AtomicRenameTemporaryPath.from_final(final_path, **options)
        return super().from_final(final_path, **options)

    def get_final(self) -> epath.Path:
        return self._step

    async def finalize(self) -> None:
        # orbax calls this in one process, when all of them have written their files.
        await super().finalize()
        committed = super().get_final()
        write_checksums(Path(committed))
        committed.rename(self._step)


class CannotSave(UserError):
    """A save has failed, on all hosts, in a way that may pass; it can be tried again.

    Attributes:
      why: what has failed, where and why, without what to do.
    """

    def __init__(self, why: str, way_out: str):
        self.why = why
        super().__init__(f"{why}. {way_out}")


class RunCheckpoints:
    """Saves and restores the steps of a run; retention never deletes the newest one."""

    def __init__(self, directory: Path, config: config_lib.Checkpoint, items: ModelItems):

        def score(metrics: Json) -> float:
            """Orbax keeps the highest score, and the lowest loss is the best.

            A checkpoint that was saved under another best_metric has the lowest score.
            """
            return -metrics.get(config.best_metric, math.inf)

        policies: list[preservation_policy.PreservationPolicy] = [
            preservation_policy.LatestN(config.keep_last)
        ]
        if config.keep_best:
            best = preservation_policy.BestN(
                get_metric_fn=score, n=config.keep_best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        self.directory = directory
        self.items = items  # a run that begins beside a base adds it
        self._last_save = (0, 0)  # its step and its bytes
        self._best_metric = config.best_metric
        self._open = lambda: Manager(
            directory.absolute(),
            config.save_timeout,
            self._describe,
            ChecksummedPath,
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            # The policies decide what is kept. Without best_fn the manager would not save the
            # metrics, and a continued run would not know its best checkpoints.
            best_fn=score,
            cleanup_tmp_directories=True,
        )
        self._manager, self._has_failed = self._open(), False
        self._unraisable_hook, sys.unraisablehook = sys.unraisablehook, self._tell_unless_cut_off

    def save(
        self,
        step: int,
        parameters: Tree,
        optimizer: Any,
        position: Json,
        config: Json,
        evaluation: dict[str, float],
    ) -> None:
        """Starts saving; returns when the values are copied from the device.

        Args:
          optimizer: a pytree of everything else that a step changes, with the step itself.
          position: where the run stands in its data.
          evaluation: the metrics of this very step; without the best_metric among them, the
            checkpoint does not compete for keep_best.

        Raises:
          UserError: this save or the one before cannot be written. If it is `CannotSave`, all
            processes raise it.
        """
        parameters = self.items.held(parameters)
        score = evaluation.get(self._best_metric, math.nan)
        scores = {self._best_metric: score} if math.isfinite(score) else None
        items = ocp.args.Composite(
            parameters=ocp.args.StandardSave(parameters, save_args(parameters)),
            optimizer=ocp.args.StandardSave(optimizer),
            position=ocp.args.JsonSave(position),
            config=ocp.args.JsonSave(config),
            **self.items.to_args(),
        )
        self.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((parameters, optimizer)))
        self._last_save = step, size
        if self._has_failed:
            self._open_again()
        self._manager.begin()
        with self._writing():
            self._manager.save(step, args=items, metrics=scores, force=True)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, parameters: Tree, optimizer: Any) -> tuple[Tree, Any]:
        """Parameters and optimizer of a step, with the shardings and dtypes of these two trees.

        Of a step beside a base, the parameters are its adapters alone.

        Raises:
          UserError: files of the step are missing or damaged, or a value is not finite.
        """
        folder = self.directory / str(step)
        if read_base(folder):
            parameters = adapters_of(self.items.model, parameters)
        args = ocp.args.Composite(
            parameters=ocp.args.StandardRestore(parameters),
            optimizer=ocp.args.StandardRestore(optimizer),
        )
        with reading(folder, "parameters or optimizer"):
            restored = self._manager.restore(step, args=args)
        for item in ("parameters", "optimizer"):
            check_finite(folder, restored[item], item)
        return restored["parameters"], restored["optimizer"]

    def wait(self) -> None:
        """Waits until the last save is complete on disk; raises UserError if it cannot be."""
        with self._writing():
            while hosts.joined() and self._manager.is_saving_in_progress():
                self._manager.raise_fault()
                time.sleep(0.02)
            self._manager.raise_fault()
            self._manager.wait_until_finished()
            self._manager.end()

    def failure(self) -> CannotSave | None:
        """The failure of the last save, as soon as it is known; told once.

        It does not wait for a save in progress. All processes call it at the same places, and get
        an answer other than None at the same call.

        Raises:
          UserError: it has failed in a way that does not pass.
        """
        if hosts.joined():
            with self._writing():
                ended = self._manager.has_failed()
        else:
            ended = not self._manager.is_saving_in_progress()
        try:
            if ended:
                self.wait()
        except CannotSave as failure:
            return failure
        return None

    def close(self) -> None:
        """Waits for the last save, and ends the threads that save."""
        try:
            self.wait()
            self._manager.close()
        finally:
            sys.unraisablehook = self._unraisable_hook

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a save that the system refuses, here or on another host, into a UserError."""
        failed = None
        try:
            yield
        except (OSError, ValueError, FailedElsewhere) as error:
            told = self._manager.failure()
            # Where one process alone has failed, the others may still write.
            if told or (hosts.joined() is None and _is_refused(error)):
                self._remove_parts()  # before it is said how much is free
            told = told or self._describe(error)
            if told is None:
                raise
            failed = self._cannot_save(told)
        if failed:
            forget_cut_off()
            raise failed from None

    def _describe(self, error: BaseException) -> Json | None:
        """Why the system refuses a save, what to do, and whether it may pass, for all hosts.

        It is None for any other error.
        """
        if not _is_refused(error):
            return None
        step, size = self._last_save
        kept = newest_step(self.directory)
        why = (
            f"cannot save checkpoint {step} in {self.directory}: "
            f"{reason(error, self.directory, size)}; "
            f"{f'checkpoint {kept.name} is whole' if kept else 'there is none before it'}"
        )
        first = "Free some space, then give" if is_full(error) else "Give"
        way_out = f"{first} the same command again"
        return {"why": why, "way_out": way_out, "passes": may_pass(error)}

    def _cannot_save(self, told: Json) -> UserError:
        """The error of a failure, after which another save may begin."""
        self._has_failed = True
        step, _ = self._last_save
        why, joined = told["why"], hosts.joined()
        if joined and "process" in told:
            why = f"{joined.names[told['process']]} {why}"
        failure = CannotSave(why, told["way_out"])
        known = joined is None or "process" in told  # in all processes
        # A step that is whole cannot be saved again: it is an older one that cannot be deleted.
        if not (known and told["passes"]) or (self.directory / str(step)).exists():
            return UserError(str(failure))
        return failure

    def _remove_parts(self) -> None:
        """Removes what was written of the last save."""
        step, _ = self._last_save
        if hosts.is_main():
            for part in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)

    def _open_again(self) -> None:
        """Takes another manager of orbax after a failure; all processes do it together.

        The old one has forgotten the steps that it was about to delete, and would raise what else
        has failed in the next save.
        """
        with suppress(Exception):
            self._manager.close()
        self._manager, self._has_failed = self._open(), False

    def _tell_unless_cut_off(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Keeps quiet about the writes that orbax cuts off when one of them has failed.

        It closes the event loop to which tensorstore then reports each of them.
        """
        if str(unraisable.exc_value) != "Event loop is closed":
            self._unraisable_hook(unraisable)


def _is_refused(error: BaseException) -> TypeGuard[Exception]:
    """Whether the system has refused a write; of tensorstore its number is in the text."""
    tensorstore = isinstance(error, ValueError) and "os_error_code" in str(error)
    return isinstance(error, OSError) or tensorstore
