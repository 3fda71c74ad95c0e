"""The train step as the TPU's compiler makes it, against the accounting by arithmetic.

Two compilations without the hardware, in a process of their own: libtpu reads the environment when
it is loaded, and the tests simulate CPU devices.
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
from moi_jax.models.compute import resolve_dtypes
from moi_jax.models.presets import preset
from moi_jax.parallel.axes import MESH_AXES

from support.runs import ROOT

# Weights and activations have similar shares of the traffic.
MODEL = dataclasses.replace(
    preset("qwen2.5-7b"), vocab_size=1152, num_layers=3, hidden_size=256, num_heads=2,
    num_kv_heads=2, head_dim=128, mlp_width=1024,
)  # fmt: skip
LENGTH = 640  # no other dimension has this size
CONFIG = {
    "mesh": {"fsdp": 2, "tensor": 2},
    "train": {"global_batch_rows": 8, "microbatch_rows": 4, "steps": 10},
    "data": {"sequence_length": LENGTH},
}
CONTEXT = CONFIG | {"mesh": {"fsdp": 2, "context": 2}}
CODE = """
import dataclasses, json, re, sys
from moi_jax.accounting.topology import parse_topology, prepare_environment
prepare_environment(compiles=True)
from moi_jax.accounting.compilation import lower_step, read_compiled
from moi_jax.accounting.topology import described_devices
from moi_jax.config.load import make_config
from moi_jax.models.config import ModelConfig
*configs, model = json.loads(sys.argv[1])
devices = described_devices(parse_topology("v5p:2x2x1", 1))
for config in configs:
    lowered = lower_step(make_config(config), ModelConfig.from_json(model), devices, "train")
    program = lowered.compile()
    shapes = sorted(set(re.findall(r"(\\w+)\\[([\\d,]+)\\]", program.as_text())))
    print(json.dumps(dataclasses.asdict(read_compiled(program, 0)) | {"shapes": shapes}))
"""


@pytest.fixture(scope="module")
def programs():
    """The steps of CONFIG and CONTEXT."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'moi_jax[plan]'")
    environment = {**os.environ, "XLA_FLAGS": ""}
    arguments = json.dumps([CONFIG, CONTEXT, MODEL.to_json()])
    done = subprocess.run(
        [sys.executable, "-c", CODE, arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def compiled(programs):
    return programs[0]


def mesh(config=CONFIG):
    return AbstractMesh(tuple(config["mesh"].get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_collectives_are_those_of_sharded_data_and_tensor_parallelism(compiled):
    expected = step_traffic(resolve_dtypes(make_config(CONFIG), "tpu"), MODEL, mesh())
    counted = {kind: values["bytes"] for kind, values in compiled["collectives"].items()}
    assert compiled["unknown_loops"] == 0
    assert counted["all-gather"] == pytest.approx(expected["all-gather"], rel=0.2)
    assert sum(counted.values()) == pytest.approx(sum(expected.values()), rel=0.1)


def test_keys_and_values_are_gathered_over_context(programs):
    expected = step_traffic(resolve_dtypes(make_config(CONTEXT), "tpu"), MODEL, mesh(CONTEXT))
    counted = {kind: values["bytes"] for kind, values in programs[1]["collectives"].items()}
    assert counted["all-gather"] == pytest.approx(expected["all-gather"], rel=0.05)
    assert sum(counted.values()) == pytest.approx(sum(expected.values()), rel=0.1)


def test_arguments_are_those_of_the_state_and_the_batch(compiled):
    state, batch = abstract_step(make_config(CONFIG), MODEL, mesh())
    assert compiled["arguments"] == pytest.approx(argument_bytes(state, batch).total, rel=0.01)


def test_temporaries_and_the_largest_buffers_are_told(compiled):
    state, batch = abstract_step(make_config(CONFIG), MODEL, mesh())
    gradients = argument_bytes(state, batch).parameters  # both are float32
    assert compiled["peak"] - compiled["arguments"] > gradients
    sizes = [size for _, size in compiled["buffers"]]
    assert sizes == sorted(sizes, reverse=True)
    # Of one matrix of all layers: [3, 256 / fsdp, 1024 / tensor].
    assert sizes[0] >= 3 * 128 * 512 * 4


def test_no_array_is_as_large_as_the_scores_of_a_row(compiled):
    """Attention is splash, which `auto` chooses for a TPU."""
    # The states [B, S, D] of a device are there: the check sees S.
    assert f"2,{LENGTH},256" in sizes(compiled, "bf16")
    for shape in sizes(compiled):
        assert shape.split(",").count(str(LENGTH)) < 2, shape


def test_no_device_holds_the_whole_head_or_its_gradient(compiled):
    whole = {f"{MODEL.hidden_size},{MODEL.vocab_size}", f"{MODEL.vocab_size},{MODEL.hidden_size}"}
    quarter = f"{MODEL.hidden_size},{MODEL.vocab_size // 4}"
    assert any(shape.endswith(quarter) for shape in sizes(compiled, "f32"))
    assert not [shape for shape in sizes(compiled) if any(shape.endswith(each) for each in whole)]


def test_the_kernels_of_all_layers_are_never_cast_at_once(compiled):
    stacked = "3,128,512"  # [L, D / fsdp, F / tensor]
    assert stacked in sizes(compiled, "f32")
    assert stacked not in sizes(compiled, "bf16")


def sizes(compiled, dtype=None):
    return {size for kind, size in compiled["shapes"] if dtype in (None, kind)}
