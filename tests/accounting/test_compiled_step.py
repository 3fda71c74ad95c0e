"""The train step as the TPU's compiler makes it, against the accounting by arithmetic.

One compilation without the hardware, in a process of its own: libtpu reads the environment when it
is loaded, and the tests simulate CPU devices.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh

from moi_jax.accounting.memory import abstract_step, argument_bytes
from moi_jax.accounting.traffic import step_traffic
from moi_jax.config.load import make_config
from moi_jax.models.presets import preset
from moi_jax.parallel.axes import MESH_AXES

from support.runs import ROOT

# Weights and activations have similar shares of the traffic.
MODEL = dataclasses.replace(
    preset("qwen2.5-7b"), vocab_size=1024, num_layers=3, hidden_size=256, num_heads=2,
    num_kv_heads=2, head_dim=128, mlp_width=1024,
)  # fmt: skip
CONFIG = {
    "mesh": {"fsdp": 2, "tensor": 2},
    "train": {"global_batch_rows": 8, "microbatch_rows": 4, "steps": 10},
    "data": {"sequence_length": 512},
}
CODE = """
import dataclasses, json, sys
from moi_jax.accounting.topology import parse_topology, prepare_environment
prepare_environment(compiles=True)
from moi_jax.accounting.compilation import compile_step
from moi_jax.config.load import make_config
from moi_jax.models.config import ModelConfig
config, model = json.loads(sys.argv[1])
topology = parse_topology("v5p:2x2x1", 1)
compiled = compile_step(make_config(config), ModelConfig.from_json(model), topology, "train")
print(json.dumps(dataclasses.asdict(compiled)))
"""


@pytest.fixture(scope="module")
def compiled():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'moi_jax[plan]'")
    environment = {**os.environ, "XLA_FLAGS": ""}
    arguments = json.dumps([CONFIG, MODEL.to_json()])
    done = subprocess.run(
        [sys.executable, "-c", CODE, arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def mesh():
    return AbstractMesh(tuple(CONFIG["mesh"].get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_collectives_are_those_of_sharded_data_and_tensor_parallelism(compiled):
    expected = step_traffic(make_config(CONFIG), MODEL, mesh())
    counted = {kind: values["bytes"] for kind, values in compiled["collectives"].items()}
    assert compiled["unknown_loops"] == 0
    assert counted["all-gather"] == pytest.approx(expected["all-gather"], rel=0.2)
    assert sum(counted.values()) == pytest.approx(sum(expected.values()), rel=0.1)


def test_arguments_are_those_of_the_state_and_the_batch(compiled):
    state, batch = abstract_step(make_config(CONFIG), MODEL, mesh())
    assert compiled["arguments"] == pytest.approx(argument_bytes(state, batch).total, rel=0.01)


def test_temporaries_and_the_largest_buffers_are_told(compiled):
    state, batch = abstract_step(make_config(CONFIG), MODEL, mesh())
    gradients = argument_bytes(state, batch).parameters  # both are float32
    assert compiled["temporaries"] > gradients
    sizes = [size for _, size in compiled["buffers"]]
    assert sizes == sorted(sizes, reverse=True)
    # Of one matrix of all layers: [3, 256 / fsdp, 1024 / tensor].
    assert sizes[0] >= 3 * 128 * 512 * 4
