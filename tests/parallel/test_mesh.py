"""The same run on another mesh, remat policy or accumulation, within the bars of docs/design.md."""

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.mesh_utils import create_hybrid_device_mesh

from moi_jax import config as config_lib
from moi_jax.common.errors import UserError
from moi_jax.models.parameters import parameter_specs, random_parameters
from moi_jax.models.presets import PRESETS
from moi_jax.parallel.axes import partition_spec
from moi_jax.parallel.mesh import make_mesh
from moi_jax.parallel.placing import check_rows, local_rows, place_batch

from support.runs import TWO_DEVICES
from support.trainer import MODEL, ROWS, STEPS, Trainer, random_batch

ONE = {"fsdp": 1}
EIGHT = {"fsdp": 4, "tensor": 2}
VARIANTS = {
    "mesh": dict(mesh=EIGHT),
    "data axis and accumulation": dict(
        mesh={"data": 2, "fsdp": 2, "tensor": 2}, microbatch_rows=ROWS // 2
    ),
    # MODEL has 2 KV heads.
    "context axis and tensor over the KV heads": dict(mesh={"tensor": 4, "context": 2}),
    "accumulation": dict(mesh=ONE, microbatch_rows=ROWS // 4),
    "remat": dict(mesh=ONE, remat="full"),
}


def losses(steps, dtype, **variant):
    trainer = Trainer(variant.pop("mesh"), dtype=dtype, **variant)
    return np.array([trainer.step(random_batch(step % 2))["loss"] for step in range(steps)])


@pytest.fixture(scope="module")
def one_float64():
    with jax.enable_x64(True):
        return losses(STEPS, "float64", mesh=ONE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_20_losses_in_float64_agree_within_1e_9(one_float64, variant):
    with jax.enable_x64(True):
        other = losses(STEPS, "float64", **VARIANTS[variant])
    assert one_float64.dtype == np.float64
    assert one_float64[-1] < one_float64[0]
    np.testing.assert_allclose(other, one_float64, rtol=0, atol=1e-9)


def test_20_losses_in_float32_agree():
    one = losses(STEPS, "float32", mesh=ONE)
    for variant in ("mesh", "context axis and tensor over the KV heads", "accumulation"):
        other = losses(STEPS, "float32", **VARIANTS[variant])
        assert abs(other[0] - one[0]) < 5e-6
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5)


def test_the_first_loss_in_bfloat16_agrees():
    one = losses(1, "float32", mesh=ONE, compute="bfloat16")
    other = losses(1, "float32", **VARIANTS["mesh"], compute="bfloat16")
    assert abs(other[0] - one[0]) < 1e-3


def test_initial_parameters_do_not_depend_on_the_mesh():
    meshes = [make_mesh(config_lib.Mesh(**axes), jax.devices()) for axes in (ONE, EIGHT)]
    one, eight = (random_parameters(MODEL, 0, "float32", mesh) for mesh in meshes)
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_parameters_and_moments_are_sharded():
    trainer = Trainer(EIGHT)
    query = trainer.state.parameters["layers"]["attention"]["query"]["kernel"]  # [L, D, H, N]
    assert query.sharding.shard_shape(query.shape) == (2, 32 // 4, 4 // 2, 8)
    head = trainer.state.parameters["head"]["kernel"]  # [D, V]
    assert head.sharding.shard_shape(head.shape) == (32 // 4, 64 // 2)
    sharded = [x for x in jax.tree.leaves(trainer.state.opt_state) if x.ndim > 2]
    assert sharded
    assert all(not x.is_fully_replicated for x in sharded)


def test_key_kernels_are_split_along_the_width_where_tensor_has_more_devices_than_kv_heads():
    trainer = Trainer({"fsdp": 2, "tensor": 4})
    attention = trainer.state.parameters["layers"]["attention"]  # 4 heads, 2 KV heads
    shards = {name: tree["kernel"].sharding.shard_shape(tree["kernel"].shape)
              for name, tree in attention.items()}  # fmt: skip
    assert shards["query"] == (2, 32 // 2, 4 // 4, 8)
    assert shards["key"] == shards["value"] == (2, 32 // 8, 2, 8)


def test_qwen_7b_shards_every_matrix_over_an_fsdp_mesh():
    mesh = {"data": 1, "fsdp": 8, "tensor": 4}
    for path, p in parameter_specs(PRESETS["qwen-7b"]).items():
        spec = partition_spec(p.axes, p.shape, mesh)
        named = [axes if isinstance(axes, tuple) else (axes,) for axes in spec if axes]
        parts = [mesh[axis] for axes in named for axis in axes]
        if len(p.shape) > 2 or path in ("embedding.table", "head.kernel"):
            expected = 4 if path.endswith(".bias") else 32
            assert np.prod(parts) == expected, path


def test_a_dimension_that_does_not_divide_stays_whole():
    assert partition_spec(("embed", "heads"), (30, 6), {"fsdp": 4, "tensor": 2}) == (
        jax.sharding.PartitionSpec(None, ("tensor",))
    )


class Chip:
    """A chip of a TPU slice, as jax describes it: each slice counts its coordinates from 0."""

    platform, device_kind, core_on_chip, num_cores = "tpu", "TPU v5", 0, 1

    def __init__(self, slice_index, coords):
        self.slice_index = self.process_index = slice_index
        self.coords = (*coords, 0)
        self.id = 100 * slice_index + 10 * coords[0] + coords[1]

    def __repr__(self):
        return f"{self.slice_index}/{self.coords}"


def chips(*shapes):
    """The chips of slices of these shapes, such as (2, 2)."""
    return [
        Chip(number, (x, y)) for number, (a, b) in enumerate(shapes)
        for y in range(b) for x in range(a)
    ]  # fmt: skip


@pytest.mark.parametrize(("data", "shape"), [(2, (1, 4)), (4, (2, 2))])
def test_data_is_split_over_the_slices_as_jax_lays_them_out(data, shape):
    devices = chips((2, 2), (2, 2))
    mesh = make_mesh(config_lib.Mesh(data=data), devices[::-1])
    expected = create_hybrid_device_mesh(shape, (2, 1), devices)
    np.testing.assert_array_equal(mesh.devices[:, :, 0, 0], expected)
    numbers = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert np.unique(numbers[: data // 2]).tolist() == [0]
    assert np.unique(numbers[data // 2 :]).tolist() == [1]


@pytest.mark.parametrize(
    ("axes", "slices"),
    [({}, [(2, 2)] * 2), ({"data": 4}, [(2, 2)] * 3), ({"data": 2, "fsdp": 3}, [(2, 2), (2, 1)])],
    ids=str,
)
def test_a_mesh_that_would_split_another_axis_over_slices_is_refused(axes, slices):
    message = f"{len(slices)} slices of .* set mesh.data to a multiple of {len(slices)}"
    with pytest.raises(UserError, match=message):
        make_mesh(config_lib.Mesh(**axes), chips(*slices))


def test_an_axis_of_the_mesh_may_be_a_part_of_an_axis_of_the_chips():
    mesh = make_mesh(config_lib.Mesh(tensor=2), chips((4, 4)))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 2, "context": 1}
    assert len({chip.id for chip in mesh.devices.flat}) == 16


def test_a_mesh_of_one_slice_takes_the_first_of_several():
    mesh = make_mesh(config_lib.Mesh(fsdp=4), chips((2, 2), (2, 2)))
    assert {chip.slice_index for chip in mesh.devices.flat} == {0}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 16}, "does not fit 8 cpu devices"),
        ({"tensor": 3}, "does not fit 8 cpu devices"),
        ({"context": 3, "fsdp": -1}, "does not fit 8 cpu devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config_lib.Mesh(**mesh), jax.devices())


def test_rows_that_do_not_divide_over_the_mesh_are_refused():
    mesh = make_mesh(config_lib.Mesh(fsdp=4, tensor=2), jax.devices())
    message = "global_batch_rows 6 is not a multiple of the 4 batch shards"
    with pytest.raises(UserError, match=message):
        check_rows(6, mesh, "train.global_batch_rows")


HOST = """
import sys
import jax, numpy as np
number, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, number)
from moi_jax import config
from moi_jax.data.loader import Batch
from moi_jax.parallel.placing import local_rows, place_batch
from moi_jax.parallel.mesh import make_mesh
mesh = make_mesh(config.Mesh(fsdp=4), jax.devices())
held = local_rows(16, 8, mesh)
print("held", *held)
whole = np.arange(16 * 3).reshape(16, 3)
placed = place_batch(Batch(*[whole[held]] * 6), held, 8, mesh).tokens
assert placed.shape == (2, 8, 3)
for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, whole.reshape(2, 8, 3)[shard.index])
print("sum", int(jax.jit(lambda x: x.sum())(placed)))
split = make_mesh(config.Mesh(fsdp=1, context=4), jax.devices())
held = local_rows(16, 8, split)
rows = np.arange(16 * 8).reshape(16, 8)
placed = place_batch(Batch(*[rows[held]] * 6), held, 8, split).tokens
for shard in placed.addressable_shards:
    early, late = shard.index[2].start // 2, 7 - shard.index[2].start // 2
    np.testing.assert_array_equal(shard.data, rows.reshape(2, 8, 8)[:, :, [early, late]])
"""


def test_two_hosts_read_disjoint_rows_and_place_one_batch():
    """Runs two real processes with two devices each; a context axis over both splits each row."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(number), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=TWO_DEVICES,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    held = [set(out.split("held ")[1].split("\n")[0].split()) for out, _ in outputs]
    assert held[0] == {"0", "1", "2", "3", "8", "9", "10", "11"}
    assert held[1] == {"4", "5", "6", "7", "12", "13", "14", "15"}
    assert all(f"sum {sum(range(48))}" in out for out, _ in outputs)


@pytest.mark.parametrize("microbatch_rows", [8, 4])
@pytest.mark.parametrize("axes", [ONE, EIGHT, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_placed_batches_hold_each_row_once(axes, microbatch_rows):
    batch = random_batch(0)
    mesh = make_mesh(config_lib.Mesh(**axes), jax.devices())
    rows = local_rows(ROWS, microbatch_rows, mesh)
    placed = place_batch(batch, rows, microbatch_rows, mesh)
    np.testing.assert_array_equal(
        placed.tokens, batch.tokens.reshape(-1, microbatch_rows, batch.tokens.shape[1])
    )
