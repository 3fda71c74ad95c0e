"""Every attention backend against a float64 oracle, and what its programs for accelerators hold.

`xla` and `blockwise` are executed here. The kernels of `splash` are executed in interpret mode, and
compiled for TPUs by libtpu. Those of `mosaic_gpu` have no such mode; they are lowered for CUDA. On
a GPU, benchmarks/gpu.py runs the same contract, the whole of it.
"""

import dataclasses
import importlib.util
import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from moi_jax.common.errors import UserError
from moi_jax.config import Mesh as MeshConfig
from moi_jax.config import Model, SplashBlocks
from moi_jax.models import attention
from moi_jax.models.attention import choose_attention
from moi_jax.models.attention.blockwise import BLOCK, BlockwiseAttention
from moi_jax.models.attention.contract import Case, cases, compiled, make_inputs, run_contract
from moi_jax.models.attention.refusals import TOKAMAX
from moi_jax.models.attention.sharded import attend_on_mesh
from moi_jax.models.attention.splash import SplashAttention
from moi_jax.models.attention.xla import xla_attention
from moi_jax.models.presets import PRESETS
from moi_jax.parallel.axes import MESH_AXES
from moi_jax.parallel.context import context_order
from moi_jax.parallel.mesh import make_mesh

from support.trainer import Trainer, random_batch

# Several blocks a row, so that some are skipped, some masked in part, and sums go over blocks.
SMALL = SplashBlocks(
    **dict.fromkeys(("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute"), 128)
)
BACKENDS = {
    "xla": xla_attention,
    "blockwise": BlockwiseAttention(),
    "blockwise, rows apart": BlockwiseAttention(rows_apart=True),
    "splash": SplashAttention(SMALL, interpret=True),
}
ROWS = ((1, 2, 63, 64, 65, 127), (383,), (192, 65, 1))
SEQUENCE = 1200
LENGTHS = (1200, 1280, 600, 640)  # of a row and of half of one, as they are and padded

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu: pip install '.[plan]'",
)
needs_tokamax = pytest.mark.skipif(
    attention.refusals.installed_tokamax() != TOKAMAX,
    reason=f"lowering for a GPU needs tokamax {TOKAMAX}: pip install '.[mosaic]'",
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_keeps_the_contract(name, dtype):
    case = Case(4, 2, ROWS, 384, width=64, dtype=dtype)
    failed = [str(result) for result in run_contract(BACKENDS[name], [case]) if not result.passed]
    assert not failed


def off_by_one_segment(query, key, value, segment_ids, positions):
    """Shows a token the segment before its own."""
    return xla_attention(query, key, value, (segment_ids + 1) // 2, jnp.zeros_like(positions))


def keys_of_other_heads(query, key, value, segment_ids, positions):
    """Shares the KV heads round robin instead of in groups."""
    mixed = (jnp.tile(heads, (1, 1, query.shape[2] // key.shape[2], 1)) for heads in (key, value))
    return xla_attention(query, *mixed, segment_ids, positions)


@pytest.mark.parametrize("wrong", [off_by_one_segment, keys_of_other_heads])
def test_contract_finds_a_wrong_backend(wrong):
    case = Case(4, 2, ((3, 2, 60), (7, 1)), 72, width=16, dtype="float32")
    results = run_contract(wrong, [case])
    assert not all(result.passed for result in results)
    if wrong is off_by_one_segment:
        assert not results[-1].passed  # it leaks


def test_whole_matrix_has_the_lengths_and_heads_where_kernels_go_wrong():
    lengths = {length for case in cases() for row in case.rows for length in row}
    assert {1, 2, 63, 64, 65, 127, 192, 639} <= lengths
    assert {(c.heads, c.kv_heads) for c in cases()} == {(28, 4), (16, 8), (32, 32)}
    assert all(any(sum(row) < case.length for row in case.rows) for case in cases())


@pytest.mark.parametrize("name", ["blockwise", "blockwise, rows apart", "splash"])
def test_rows_that_are_no_multiple_of_a_block_are_padded(name):
    case = Case(2, 1, ((130,), (128,)), 130, width=16, dtype="float32")
    assert all(result.passed for result in run_contract(BACKENDS[name], [case]))


@pytest.mark.parametrize("apart", [False, True])
def test_blockwise_does_not_compute_blocks_that_no_query_sees(apart):
    """What is not computed cannot show: zero times NaN would be NaN.

    Rows that are not apart go through the blocks that one of them sees.
    """
    rows = (2 * BLOCK, BLOCK, 2 * BLOCK), *(((5 * BLOCK,),) if apart else ())
    case = Case(2, 1, rows, 6 * BLOCK, width=8, dtype="float32")
    inputs, segment_ids = make_inputs(case)
    others, between = np.isin(segment_ids[0], (1, 3)), segment_ids[0] == 2
    for array in inputs:
        array[0, others] = np.nan
    for found in compiled(BlockwiseAttention(rows_apart=apart), segment_ids)(*inputs):
        assert np.isfinite(found[0, between]).all()
        assert np.isnan(found[0, others]).any()


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads"),
    [(4, 4, 2), (4, 4, 1), (3, 4, 2), (4, 3, 1)],
    ids=["all divide", "one KV head", "rows do not divide", "heads do not divide"],
)
def test_rows_and_heads_are_split_over_a_mesh(rows, heads, kv_heads):
    case = Case(heads, kv_heads, ((9, 4),) * rows, 16, width=8, dtype="float32")
    inputs, segment_ids = make_inputs(case)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())

    def local(query, key, value, ids):
        assert query.shape[0] == (1 if rows == 4 else rows)
        assert query.shape[2] == (2 if heads == 4 else heads)
        index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return xla_attention(query, key, value, ids, index)

    def on_mesh(query, key, value, ids, positions):
        return attend_on_mesh(local, mesh, query, key, value, ids)

    expected = compiled(xla_attention, segment_ids)(*inputs)
    for one, other in zip(expected, compiled(on_mesh, segment_ids)(*inputs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


ON_MESH = {
    "blockwise": BlockwiseAttention,
    "blockwise, rows apart": partial(BlockwiseAttention, rows_apart=True),
    "splash": lambda mesh: SplashAttention(SMALL, mesh, interpret=True),
}


@pytest.mark.parametrize("name", ON_MESH)
def test_backend_keeps_the_contract_where_a_context_axis_splits_the_rows(name):
    """A device has 192 queries of 384, which is no multiple of a block."""
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=2, context=2), jax.devices())
    backend, order = ON_MESH[name](mesh), context_order(384, 2)

    def attend(*arrays):
        return backend(*(x[:, order] for x in arrays))[:, np.argsort(order)]

    case = Case(4, 2, ROWS, 384, width=16, dtype="float32")
    failed = [str(result) for result in run_contract(attend, [case]) if not result.passed]
    assert not failed


def test_a_step_with_splash_on_all_axes_equals_one_with_xla_on_one_device():
    one = Trainer({"fsdp": 1})
    split = Trainer({"fsdp": 2, "tensor": 2, "context": 2}, attention=ON_MESH["splash"])
    for seed in range(3):
        expected, found = (trainer.step(random_batch(seed)) for trainer in (one, split))
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0, atol=5e-6)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-5)


def gradient_program(attend, mesh=None, saved=()):
    """Traces value and gradients of two layers of attention, scanned and rematerialised."""
    shape = jax.ShapeDtypeStruct
    if mesh is not None:
        shape = partial(shape, sharding=NamedSharding(mesh, PartitionSpec()))
    query = shape((2, SEQUENCE, 4, 64), jnp.bfloat16)
    key = shape((2, SEQUENCE, 2, 64), jnp.bfloat16)
    segment_ids = shape((2, SEQUENCE), jnp.int32)

    def loss(query, key, value, segment_ids):
        @partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.save_only_these_names(*saved),
            prevent_cse=False,
        )
        def layer(query, _):
            return attend(query, key, value, segment_ids, segment_ids), None

        output, _ = jax.lax.scan(layer, query, length=2)
        return jnp.sum(output.astype(jnp.float32) ** 2)

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return program.trace(query, key, key, segment_ids)


def square_arrays(text):
    """Returns the shapes in a program's text that have two dimensions of a row, or half of one."""
    shapes = {tuple(re.findall(r"\d+", dims)) for dims in re.findall(r"[\[<]((?:\d+[,x]?)+)", text)}
    return [shape for shape in shapes if sum(int(n) in LENGTHS for n in shape) > 1]


@pytest.mark.parametrize(
    ("backend", "square"),
    [
        (xla_attention, True),
        (BlockwiseAttention(), False),
        (BlockwiseAttention(rows_apart=True), False),
    ],
)
def test_only_xla_holds_all_scores(backend, square):
    traced = gradient_program(backend)
    for text in (
        traced.lower(lowering_platforms=("cuda",)).as_text(),
        traced.lower().compile().as_text(),
    ):
        assert bool(square_arrays(text)) is square


# Where rows are rematerialised in full, the forward kernel runs twice; saving "context" avoids it.
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "split", "saved", "kernels"),
    [
        ("v5e:2x2", "fsdp", (), 3),
        ("v5p:2x2x1", "context", ("context",), 2),
        ("v6e:2x2", "fsdp", ("context",), 2),
    ],
)
def test_splash_compiles_for_tpus_without_all_scores(topology, split, saved, kernels, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.devices()  # has read XLA_FLAGS; libtpu ends the process for a flag that it does not know
    monkeypatch.setenv("XLA_FLAGS", "")
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, "tensor": 2, split: 2}), chips)
    attend = choose_attention(Model(), PRESETS["qwen2.5-0.5b"], chips[0], mesh, "bfloat16")
    text = gradient_program(attend, mesh, saved).lower().compile().as_text()
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call", text)) == kernels
    assert not square_arrays(text)


@needs_tokamax
@pytest.mark.parametrize(
    ("sizes", "saved", "kernels"),
    [(None, (), 4), ({"data": 2, "fsdp": 1, "tensor": 2}, ("context",), 3)],
)
def test_mosaic_gpu_lowers_for_cuda_without_all_scores(sizes, saved, kernels):
    """Its backward pass is two kernels."""
    from moi_jax.models.attention.mosaic_gpu import MosaicGpuAttention

    mesh = make_mesh(MeshConfig(**sizes), jax.devices()) if sizes else None
    traced = gradient_program(MosaicGpuAttention(mesh), mesh, saved)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == kernels
    assert not square_arrays(text)


@needs_tokamax
def test_mosaic_gpu_starts_are_those_of_runs_of_equal_ids():
    from moi_jax.models.attention.mosaic_gpu import segment_starts

    ids = jnp.array([[1, 1, 2, 2, 2, 0], [3, 1, 1, 0, 0, 0]])
    assert segment_starts(ids).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 1, 3, 3, 3]]


CPU = types.SimpleNamespace(platform="cpu")
TPU = types.SimpleNamespace(platform="tpu")
A100, H100, B200 = (
    types.SimpleNamespace(platform="gpu", compute_capability=c) for c in ("8.0", "9.0", "10.0")
)
QWEN = PRESETS["qwen2.5-7b"]
WIDE = dataclasses.replace(QWEN, head_dim=512)
SPLIT_ROWS = AbstractMesh((1, 1, 1, 2), MESH_AXES)


@pytest.fixture
def tokamax(monkeypatch):
    monkeypatch.setattr(attention.refusals, "installed_tokamax", lambda: TOKAMAX)


@pytest.mark.parametrize(
    ("name", "device", "model", "mesh", "dtype", "message"),
    [
        ("splash", CPU, QWEN, None, "float32", "it runs on a TPU, and the device is a CPU"),
        ("splash", TPU, QWEN, None, "float64", "not in float64"),
        ("splash", TPU, WIDE, None, "bfloat16", "heads of up to 256, and the model's are 512"),
        ("mosaic_gpu", TPU, QWEN, None, "bfloat16", "it runs on a GPU, and the device is a TPU"),
        ("mosaic_gpu", A100, QWEN, None, "bfloat16", "capability 9.0 (H100, H200), and this GPU's"),
        ("mosaic_gpu", B200, QWEN, None, "bfloat16", "this GPU's is 10.0"),
        ("mosaic_gpu", H100, QWEN, None, "float32", "in bfloat16, not in float32"),
        ("mosaic_gpu", H100, WIDE, None, "bfloat16", "heads of up to 128"),
        ("mosaic_gpu", H100, QWEN, SPLIT_ROWS, "bfloat16", "mesh.context"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("tokamax")
def test_backend_refuses_by_name_what_it_cannot_compute(name, device, model, mesh, dtype, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        choose_attention(Model(attention=name), model, device, mesh, dtype)
    assert str(raised.value).startswith(f"model.attention {name}: ")


def test_mosaic_gpu_names_the_version_of_tokamax_that_it_needs(monkeypatch):
    for installed in (None, "0.0.1"):
        monkeypatch.setattr(attention.refusals, "installed_tokamax", lambda v=installed: v)
        with pytest.raises(UserError, match=f"tokamax {TOKAMAX}, and {installed or 'none'} is"):
            choose_attention(Model(attention="mosaic_gpu"), QWEN, H100, None, "bfloat16")


@pytest.mark.usefixtures("tokamax")
def test_auto_takes_the_kernel_of_the_device_or_says_why_not(log_text):
    assert choose_attention(Model(), QWEN, CPU, None, "float32") == BlockwiseAttention(
        rows_apart=True
    )
    chosen = choose_attention(Model(), QWEN, TPU, None, "bfloat16")
    assert chosen == SplashAttention(SplashBlocks())
    assert hash(chosen) == hash(choose_attention(Model(), QWEN, TPU, None, "bfloat16"))
    assert log_text.getvalue() == ""
    assert choose_attention(Model(), QWEN, A100, None, "bfloat16") == BlockwiseAttention()
    assert "attention is blockwise, in plain XLA operations, not mosaic_g" in log_text.getvalue()


@needs_tokamax
def test_auto_takes_mosaic_gpu_on_a_hopper_gpu():
    from moi_jax.models.attention.mosaic_gpu import MosaicGpuAttention

    assert choose_attention(Model(), QWEN, H100, None, "bfloat16") == MosaicGpuAttention()
