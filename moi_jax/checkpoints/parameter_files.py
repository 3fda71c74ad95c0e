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
from moi_jax.models.parameters import Parameter, map_parameters, parameter_specs
from moi_jax.parallel import hosts

CHUNK_BYTES = 16 << 20
# Bytes written at a time: enough chunks to keep the cores busy.
BLOCK_BYTES = 128 << 20
# Size of a file of the store, which is assembled in memory.
FILE_BYTES = 64 << 20

Stream = Iterable[tuple[str, np.ndarray]]  # of (dotted path, parameter)


def save_parameters(directory: Path, config: ModelConfig, stream: Stream, dtype: np.dtype) -> None:
    """Writes the item `parameters` of a step into the new directory `directory`.

    Args:
      stream: each parameter of `config` once, in any order, in `dtype`.

    Raises:
      OSError: the files cannot be written.
    """
    registry = ocp.type_handlers.create_type_handler_registry((Expected, StreamHandler(stream)))
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, multiprocessing_options=by_this_process()
    )
    tree = map_parameters(config, lambda _, p: Expected(p.shape, dtype))
    directory.mkdir()
    # The handler is used directly: a checkpointer makes the directory in its own thread, and after
    # an error here the threads of its other items would wait for minutes.
    place = epath.Path(directory.absolute())
    args = ocp.args.PyTreeSave(
        tree, save_args=save_args(config, dtype), ocdbt_target_data_file_size=FILE_BYTES
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


def save_args(config: ModelConfig, dtype: jax.typing.DTypeLike) -> Tree:
    """For each parameter, how orbax cuts it into chunks."""

    def make(path: str, parameter: Parameter) -> ocp.SaveArgs:
        large = math.prod(parameter.shape) * np.dtype(dtype).itemsize > CHUNK_BYTES
        layers = (0,) if large and path.startswith("layers.") else ()
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=layers)

    return map_parameters(config, make)


class StoredParameters:
    """The parameters of a step on disk; each is read when it is needed."""

    def __init__(self, step: Path, config: ModelConfig):
        """Raises KeyError, OSError or ValueError when the files are missing or damaged."""
        context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
        directory = epath.Path(step.absolute() / "parameters")
        self.step = step
        self.arrays: dict[str, ts.TensorStore] = {}
        for path in parameter_specs(config):
            info = ocp.type_handlers.ParamInfo(name=path, parent_dir=directory)
            spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
            self.arrays[path] = ts.open(spec, read=True, context=context).result()

    @property
    def dtype(self) -> np.dtype:
        """The common dtype of all parameters."""
        return np.result_type(*(stored.dtype.numpy_dtype for stored in self.arrays.values()))

    def get(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter by its dotted path, or one layer of a stacked one.

        Raises:
          UserError: its files are damaged, or a value is not finite.
        """
        stored = self.arrays[path]
        with reading(self.step, f"parameters/{path}"):
            array = (stored if layer is None else stored[layer]).read().result()
        check_finite_array(self.step, array, path)
        return array
