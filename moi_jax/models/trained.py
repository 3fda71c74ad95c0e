"""Which parameters a run trains: those whose modules say so, less the frozen ones."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from moi_jax.common.errors import UserError
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import abstract_parameters, parameter_specs
from moi_jax.models.patterns import LAYERS, matching

Runs = tuple[tuple[int, int], ...]  # of layers, each from the first one to before the second one


@dataclasses.dataclass(frozen=True)
class Trained:
    """The trained parameters of a model; the others are frozen.

    Attributes:
      paths: the dotted paths of the parameters that are trained, at least in some layers.
      layers: the trained layers of each stacked parameter that is trained in some of its layers
        only.
    """

    paths: frozenset[str]
    layers: dict[str, Runs]

    def split(self, parameters: Tree) -> tuple[Tree, Tree]:
        """Splits the tree into the parameters that are trained, and those that are not at all."""
        parts: tuple[Tree, Tree] = {}, {}
        for path, value in traverse_util.flatten_dict(parameters, sep=".").items():
            parts[path not in self.paths][path] = value
        trainable, frozen = (traverse_util.unflatten_dict(part, sep=".") for part in parts)
        return trainable, frozen

    def part(self, trainable: Tree) -> Tree:
        """Returns the trained layers of all trainable arrays: [L, ...] -> [trained layers, ...]."""
        flat = traverse_util.flatten_dict(trainable, sep=".")
        for path, runs in self.layers.items():
            flat[path] = jnp.concatenate([flat[path][start:end] for start, end in runs])
        return traverse_util.unflatten_dict(flat, sep=".")

    def put(self, trainable: Tree, part: Tree) -> Tree:
        """Returns the trainable arrays with their trained layers from `part`."""
        whole, flat = (traverse_util.flatten_dict(tree, sep=".") for tree in (trainable, part))
        for path, runs in self.layers.items():
            layers, array, taken = flat[path], whole[path], 0
            for start, end in runs:
                array = array.at[start:end].set(layers[taken : taken + end - start])
                taken += end - start
            flat[path] = array
        return traverse_util.unflatten_dict(flat, sep=".")

    def place(self, path: str, layer: int | None) -> int | None:
        """Returns where `part` has a layer of a parameter; None for one that is not trained."""
        before = 0
        for start, end in self.layers.get(path, ()):
            if layer is not None and start <= layer < end:
                return before + layer - start
            before += end - start
        return None if path in self.layers else layer

    def share(self, path: str, num_layers: int) -> float:
        """Returns which share of a parameter of the model is trained, from 0 to 1."""
        if path not in self.layers:
            return float(path in self.paths)
        return sum(end - start for start, end in self.layers[path]) / num_layers

    def described(self, path: str) -> str:
        """Returns which part of a parameter is trained: "yes", "no" or "layers 0-3, 7"."""
        if path not in self.layers:
            return "yes" if path in self.paths else "no"
        runs = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in self.layers[path]]
        return f"layers {', '.join(runs)}"

    def counts(self, config: ModelConfig) -> tuple[int, int]:
        """Returns the number of trained values, and of all values of the model."""
        every = abstract_parameters(config.unquantized, jnp.float32)  # values, not codes
        part = jax.eval_shape(lambda p: self.part(self.split(p)[0]), every)
        trained, values = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (part, every))
        return trained, values


def trained_parameters(config: ModelConfig, frozen: Sequence[str] = ()) -> Trained:
    """Returns which parameters of a model are trained if the patterns `frozen` name the others.

    A pattern (see `patterns.matching`) is `embedding`, `layers.*norm`, `*.bias` and so on. A number
    or a range after `layers` names some layers, counted from 0: `layers.0-15`, `layers.3.mlp`.

    Raises:
      UserError: a pattern names no parameter, or nothing is left to train.
    """
    specs = parameter_specs(config)
    trained = {
        path: np.full(spec.shape[0] if path.startswith("layers.") else 1, spec.trainable)
        for path, spec in specs.items()
    }
    for pattern in frozen:
        name, layers = _parse(pattern, config.num_layers)
        if not (matched := matching(specs, name)):
            raise UserError(
                f"optimizer.frozen: no parameter of the model matches {pattern!r}; "
                f"--print-sharding optimizer.frozen=[] lists them"
            )
        for path in matched:
            trained[path][layers] = False
    paths = frozenset(path for path, layers in trained.items() if layers.any())
    if not paths:
        raise UserError("optimizer.frozen leaves no parameter to train; remove a pattern")
    return Trained(paths, {p: _runs(trained[p]) for p in sorted(paths) if not trained[p].all()})


def _parse(pattern: str, num_layers: int) -> tuple[str, slice]:
    """Splits a pattern into that of the stacked parameter and the layers that it names."""
    found = LAYERS.match(pattern)
    if not found:
        return pattern, slice(None)
    first, last = int(found[1]), int(found[2] or found[1])
    if not first <= last < num_layers:
        raise UserError(
            f"optimizer.frozen: {pattern!r} does not name layers of the model, which has "
            f"{num_layers}, counted from 0"
        )
    return "layers" + pattern[found.end() :], slice(first, last + 1)


def _runs(layers: np.ndarray) -> Runs:
    """Returns the runs of true values: [T, T, F, T] -> ((0, 2), (3, 4))."""
    edges = np.flatnonzero(np.diff(layers, prepend=False, append=False))
    return tuple((int(start), int(end)) for start, end in edges.reshape(-1, 2))
