"""Parameters on disk, written and read one at a time, so that a model may exceed the memory.

The files are those of orbax (an OCDBT store of zarr arrays), so orbax can restore whole trees.
Large parameters are stored in chunks of single layers of at most CHUNK_BYTES: one layer, or one
shard of a mesh, can be read without the others.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from moi_jax.checkpoints.damage import reading
from moi_jax.checkpoints.finite import check_finite_array
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import map_parameters
from moi_jax.parallel import hosts

CHUNK_BYTES = 16 << 20
# Bytes written at a time: enough chunks to keep the cores busy.
BLOCK_BYTES = 128 << 20
# Size of a file of the store, which is assembled in memory.
FILE_BYTES = 64 << 20

Stream = Iterable[tuple[str, np.ndarray]]  # of (dotted path, parameter)


def save_parameters(directory: Path, tree: Tree, stream: Stream) -> None:
    """Writes the item `parameters` of a step into the new directory `directory`.

    Args:
      tree: what the stream will give, as `Expected`.
      stream: each parameter once, in any order.

    Raises:
      OSError: the files cannot be written.
    """
    registry = ocp.type_handlers.create_type_handler_registry((Expected, StreamHandler(stream)))
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, multiprocessing_options=by_this_process()
    )
    directory.mkdir()
    # The handler is used directly: a checkpointer makes the directory in its own thread, and after
    # an error here the threads of its other items would wait for minutes.
    place = epath.Path(directory.absolute())
    args = ocp.args.PyTreeSave(
        tree, save_args=save_args(tree), ocdbt_target_data_file_size=FILE_BYTES
    )
    handler.save(place, args=args)
    handler.finalize(place)


def by_this_process() -> ocp.options.MultiprocessingOptions:
    """Lets orbax write without the other processes of a run, which write nothing meanwhile."""
    index = hosts.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


@dataclasses.dataclass(frozen=True)
class Expected:
    """Stands for a parameter in the tree that orbax saves; its values come from the stream."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def expected(config: ModelConfig, dtype: np.dtype) -> Tree:
    """All parameters of a model where those that are no adapters have `dtype`."""
    return map_parameters(config, lambda _, p: Expected(p.shape, p.dtype(dtype)))


class StreamHandler(ocp.type_handlers.NumpyHandler):
    """Writes a tree of `Expected` from a stream of arrays; the files restore as numpy arrays."""

    def __init__(self, stream: Stream):
        super().__init__()
        self._stream = stream

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        assert args is not None
        waiting = {i.name: (v, i, a) for v, i, a in zip(values, infos, args, strict=True)}
        for path, array in self._stream:
            value, info, arg = waiting.pop(path)
            assert (array.shape, array.dtype) == (value.shape, value.dtype), path
            spec = ocp.type_handlers.get_json_tspec_write(
                info, True, array.shape, array.shape, array.dtype, process_index=0, arg=arg
            )
            try:
                stored = await ts.open(spec, create=True, context=info.ts_context)
                chunk_rows = stored.spec().to_json()["metadata"]["chunks"][0]
                for block in _blocks(array, chunk_rows):
                    await stored[block].write(array[block])
            except ValueError as error:  # tensorstore reports a full disk this way, too
                raise OSError(str(error)) from None
            del array  # otherwise it would live until the next one is made
        assert not waiting, sorted(waiting)
        return []


def _blocks(array: np.ndarray, chunk_rows: int) -> Iterator[slice]:
    """Ranges of the first axis that hold whole chunks, of about BLOCK_BYTES each."""
    chunks = BLOCK_BYTES // (array[:1].nbytes * chunk_rows)
    rows = chunk_rows * max(1, chunks)
    for start in range(0, len(array), rows):
        yield slice(start, min(start + rows, len(array)))


def save_args(parameters: Tree) -> Tree:
    """For each parameter, an array or `Expected`, how orbax cuts it into chunks."""

    def make(path: tuple, parameter: Any) -> ocp.SaveArgs:
        large = parameter.nbytes > CHUNK_BYTES
        layers = (0,) if large and path[0].key == "layers" else ()
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=layers)

    return jax.tree_util.tree_map_with_path(make, parameters)


class StoredParameters:
    """Parameters of a step on disk; each is read when it is needed."""

    def __init__(self, step: Path, paths: Iterable[str], item: str = "parameters"):
        """Raises KeyError, OSError or ValueError when the files are missing or damaged.

        Args:
          item: another item of the step that has arrays with these paths.
        """
        context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
        directory = epath.Path(step.absolute() / item)
        self.step, self._item = step, item
        self.arrays: dict[str, ts.TensorStore] = {}
        for path in paths:
            info = ocp.type_handlers.ParamInfo(name=path, parent_dir=directory)
            spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
            self.arrays[path] = ts.open(spec, read=True, context=context).result()

    @property
    def dtype(self) -> np.dtype:
        """The common dtype of all parameters."""
        return np.result_type(*map(self.dtype_of, self.arrays))

    def dtype_of(self, path: str) -> np.dtype:
        """The dtype of a parameter."""
        return self.arrays[path].dtype.numpy_dtype

    def get(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter by its dotted path, or one layer of a stacked one.

        Raises:
          UserError: its files are damaged, or a value is not finite.
        """
        stored = self.arrays[path]
        with reading(self.step, f"{self._item}/{path}"):
            array = (stored if layer is None else stored[layer]).read().result()
        check_finite_array(self.step, array, path)
        return array
