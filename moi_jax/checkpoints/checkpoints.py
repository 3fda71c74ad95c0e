"""Checkpoints: one orbax step holds all a model needs, so that its folder can be moved alone.

Items of a step: `parameters`, `model` (architecture), `tokenizer` (its files), `prompts`
(default and domain prompts, chat template), `provenance` (of the published weights it began from);
from training also `optimizer`, `position` (data position, seed) and `config`.
"""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moi_jax.checkpoints.parameter_files import (
    StoredParameters,
    Stream,
    save_args,
    save_parameters,
)
from moi_jax.common.errors import UserError
from moi_jax.config import schema as config_lib
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Decoder
from moi_jax.models.parameters import Tree, abstract_parameters, declare
from moi_jax.parallel.sharding import parameter_shardings
from moi_jax.text.prompts import saved_template
from moi_jax.text.tokenizer import Tokenizer
from moi_jax.training.state import TrainState

# Its own lines on every save would bury the run's.
logging.getLogger("absl").setLevel(logging.ERROR)

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelItems:
    """What makes parameters usable: architecture, tokenizer files, prompts and template.

    `provenance` is empty where the parameters began at random, see provenance.py.
    """

    model: ModelConfig
    tokenizer: dict[str, str]
    prompts: Json
    provenance: Json = dataclasses.field(default_factory=dict)

    def to_args(self) -> dict[str, ocp.args.JsonSave]:
        return {
            "model": ocp.args.JsonSave(self.model.to_json()),
            "tokenizer": ocp.args.JsonSave({"files": self.tokenizer}),
            "prompts": ocp.args.JsonSave(self.prompts),
            "provenance": ocp.args.JsonSave(self.provenance),
        }


def save_model(path: Path, stream: Stream, dtype: np.dtype, items: ModelItems) -> None:
    """Writes a checkpoint without training state, holding one parameter at a time.

    Args:
      path: must not exist; it is there only when whole, else a folder beside it.
      stream: (dotted path, array of `dtype`) of every parameter of the model, in any order.

    Raises:
      OSError: `path` cannot be written.
    """
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), ocp.args.Composite(**items.to_args()))
    save_parameters(path / "parameters", items.model, stream, dtype)


class RunCheckpoints:
    """The checkpoints of a run, saved in the background, the newest never lost."""

    def __init__(self, directory: Path, config: config_lib.Checkpoint, items: ModelItems):

        def score(metrics: Json) -> float:
            """The greatest is kept, and a loss is best when least.

            A checkpoint saved under another best_metric competes no more.
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
        self._items = items
        self._best_metric = config.best_metric
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                # The policies decide what is kept. Without this the manager would not write the
                # metrics down, and a run that goes on would know the best of none.
                best_fn=score,
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        step: int,
        state: TrainState,
        position: Json,
        config: Json,
        evaluation: dict[str, float],
    ) -> None:
        """Starts saving; returns once the device values are copied.

        `evaluation` is that of this very step: only such checkpoints compete for keep_best.
        """
        score = evaluation.get(self._best_metric, math.nan)
        scores = {self._best_metric: score} if math.isfinite(score) else None
        items = ocp.args.Composite(
            parameters=ocp.args.StandardSave(
                state.parameters,
                save_args(self._items.model, jax.tree.leaves(state.parameters)[0].dtype),
            ),
            optimizer=ocp.args.StandardSave({"step": state.step, "state": state.optimizer}),
            position=ocp.args.JsonSave(position),
            config=ocp.args.JsonSave(config),
            **self._items.to_args(),
        )
        self._manager.save(step, args=items, metrics=scores, force=True)

    def latest(self) -> int | None:
        """The newest whole step, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a step, on the mesh and in the dtypes of `abstract`.

        Raises:
          UserError: files of the step are missing or damaged.
        """
        args = ocp.args.Composite(
            parameters=ocp.args.StandardRestore(abstract.parameters),
            optimizer=ocp.args.StandardRestore(
                {"step": abstract.step, "state": abstract.optimizer}
            ),
        )
        try:
            restored = self._manager.restore(step, args=args)
        except (KeyError, OSError, ValueError) as error:
            raise _damaged(self.directory / str(step), error) from None
        optimizer = restored["optimizer"]
        return TrainState(optimizer["step"], restored["parameters"], optimizer["state"])

    def read_json(self, step: int, item: str) -> Json:
        """Raises UserError when the item is missing or damaged."""
        args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        try:
            return self._manager.restore(step, args=args)[item]
        except (KeyError, OSError, ValueError) as error:
            raise _damaged(self.directory / str(step), error) from None

    def close(self) -> None:
        """Waits until the last save is whole on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def find_step(path: Path) -> Path:
    """The directory of one step: `path` itself, or the newest step of a run.

    Raises:
      UserError: nothing there is a checkpoint.
    """
    path = path.expanduser()
    if (path / "parameters").is_dir():
        return path
    for folder in (path, path / "checkpoints"):
        if step := newest_step(folder):
            return step
    raise UserError(
        f"{path} is no checkpoint (no 'parameters' inside); name one written by training or by "
        f"python -m moi_jax.convert import"
    )


def newest_step(folder: Path) -> Path | None:
    """The newest whole step among the checkpoints in a folder."""
    steps = [
        int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / "parameters").is_dir()
    ]
    return folder / str(max(steps)) if steps else None


def read_items(path: Path) -> ModelItems:
    """Architecture, tokenizer files and prompts of a checkpoint."""
    names = ["model", "tokenizer", "prompts"]
    step = find_step(path)
    if (step / "provenance").is_dir():
        names.append("provenance")
    items = {name: read_json_item(step, name) for name in names}
    try:
        model, files = ModelConfig.from_json(items["model"]), items["tokenizer"]["files"]
    except (KeyError, TypeError) as error:
        raise _damaged(step, error) from None
    return ModelItems(model, files, items["prompts"], items.get("provenance", {}))


def read_json_item(step: Path, name: str) -> Json:
    """Raises UserError when the item is missing or damaged."""
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            args = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
            return checkpointer.restore(step.absolute(), args)[name]
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise _damaged(step, error) from None


def stored_parameters(step: Path, config: ModelConfig) -> StoredParameters:
    """The parameters of a step, to be read one at a time.

    Raises:
      UserError: files are missing or damaged, or the stored shapes are not those of `config`.
    """
    try:
        stored = StoredParameters(step, config)
    except (KeyError, OSError, ValueError) as error:
        raise _damaged(step, error) from None
    _check_shapes(step, stored.arrays, declare(config))
    return stored


def read_parameters(
    path: Path, config: ModelConfig, dtype: jax.typing.DTypeLike, mesh: Mesh | None
) -> Tree:
    """Parameters of a checkpoint, cast to `dtype`, laid out on `mesh` (None: one device).

    Raises:
      UserError: the stored shapes are not those of `config`.
    """
    step = find_step(path).absolute()
    abstract = abstract_parameters(config, dtype)
    if mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: sharding, abstract)
    else:
        shardings = parameter_shardings(config, mesh)
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(step / "parameters").item_metadata.tree
        _check_shapes(step, stored, abstract)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            args = ocp.args.Composite(parameters=ocp.args.StandardRestore(wanted))
            return checkpointer.restore(step, args)["parameters"]
    except (AttributeError, KeyError, OSError, ValueError) as error:
        raise _damaged(step, error) from None


def _damaged(step: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{step} is damaged or not whole ({reason}); use another checkpoint")


def _check_shapes(step: Path, stored: Any, expected: Tree) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    found, wanted = shapes(stored), shapes(expected)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{step}: parameter {name} has shape {found.get(name)}, the model needs "
                f"{wanted.get(name)}; is this the checkpoint of another architecture?"
            )


def load(
    path: str | Path,
    dtype: jax.typing.DTypeLike = "float32",
    mesh: Mesh | None = None,
    chat_template: str | None = None,
) -> tuple[Decoder, Tokenizer]:
    """A model in inference mode and its tokenizer, from any checkpoint of ours.

    Args:
      path: a step directory, or a run (its newest step).
      dtype: of the parameters and the computation.
      mesh: where the parameters are laid out; None is one device.
      chat_template: its name; None for the one the checkpoint was made with, if any.

    Raises:
      UserError: `path` holds no checkpoint, or one whose template is rendered otherwise now.
    """
    items = read_items(Path(path))
    if chat_template is None and items.prompts["chat_template"] is not None:
        chat_template = saved_template(items.prompts, path, "chat_template")
    parameters = read_parameters(Path(path), items.model, dtype, mesh)
    model = Decoder(items.model, parameters, compute_dtype=dtype)
    return model, Tokenizer.from_files(items.tokenizer, chat_template)
