"""The plan by arithmetic: rooflines, the work of a step, the sweep, the JSON, the messages."""

import dataclasses
import importlib.util
import json
import math
import os
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from moi_jax import plan as command
from moi_jax.accounting import compilation
from moi_jax.accounting.compilation import Compiled, largest_buffers, lower_step
from moi_jax.accounting.kept import kept_path, read_kept
from moi_jax.accounting.layers import kept_width, repeated_flops
from moi_jax.accounting.memory import Arguments, kv_cache_bytes
from moi_jax.accounting.plan import make_plan
from moi_jax.accounting.planner import Planner
from moi_jax.accounting.price_list import describe_offers, offers_json, price_list
from moi_jax.accounting.roofline import Executed, flops_of, hbm_traffic, roofline
from moi_jax.accounting.show import describe_plan, describe_sweep
from moi_jax.accounting.sweep import candidates, sweep
from moi_jax.accounting.topology import parse_topology
from moi_jax.accounting.traffic import host_traffic, network_traffic, step_traffic
from moi_jax.accounting.work import full_rows, work_of
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config, make_config
from moi_jax.config.model import Model
from moi_jax.models.flops import step_flops
from moi_jax.models.lora import adapted
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.presets import preset
from moi_jax.parallel.axes import MESH_AXES
from moi_jax.parallel.chips import GIB, chip_of

from support.runs import open_data, small_config

MODEL = preset("qwen2.5-7b")
CONFIG = make_config(
    {
        "model": {"preset": "qwen2.5-7b", "attention": "xla"},
        "data": {"sequence_length": 4096},
        "train": {"global_batch_rows": 64, "microbatch_rows": 8, "steps": 100},
    }
)
ONE_EPOCH = ("train.steps=null", "train.epochs=1")
V5P = parse_topology("v5p:2x2x2", 1)
WORK = full_rows(CONFIG, "a test")
WEIGHTS = 3584 * (2 * 3584 + 1024) + 3 * 3584 * 18944  # numbers in the matrices of a layer
NOTHING = {"gradients": 0, "saved activations": 0}


def with_values(**sections):
    """CONFIG with other values, by section."""
    values = CONFIG.model_dump(mode="json")
    for section, changes in sections.items():
        values[section] |= changes
    return make_config(values)


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


@pytest.fixture
def environment(monkeypatch):
    """What a command sets for libtpu is gone after the test."""
    monkeypatch.setattr(os, "environ", {**os.environ})


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["plan", *map(str, arguments)])
    assert command.main() == 0
    return capsys.readouterr().out


# Time


def test_the_step_takes_as_long_as_its_slowest_resource():
    chip = chip_of("TPU v5")  # 459e12 FLOP/s, 2.765e12 and 600e9 bytes/s, 6.25e9 by the network
    flops = Executed(useful=459 * 10**12, usual=918 * 10**12, executed=1836 * 10**12)
    line = roofline(chip, 2, flops, hbm_bytes=2.765e12, sent_bytes=0.6e12)
    assert line.compute_s == pytest.approx(2)
    assert (line.hbm_s, line.ici_s, line.network_s) == pytest.approx((1, 1, 0))
    assert (line.step_s, line.bound) == (pytest.approx(2), "compute")
    # 918e12 operations on two chips in two seconds.
    assert (line.mfu, line.useful_mfu) == pytest.approx((0.5, 0.25))
    slow = roofline(chip, 2, flops, 2.765e12, 0.6e12, network_bytes=62.5e9)
    assert (slow.step_s, slow.bound) == (pytest.approx(10), "network")
    assert slow.mfu == pytest.approx(0.1)


def test_repeated_operations_are_those_of_what_is_not_kept():
    """Qwen2.5-7B by its letters: D 3584, H 28, K 4, N 128, F 18944, L 28."""
    tokens, pairs = 4096, 4096 * 4097 // 2
    query, kv, out, up = 3584 * 3584, 3584 * 1024, 3584 * 3584, 3584 * 18944
    attention = 28 * 4 * pairs * 28 * 128
    assert repeated_flops(MODEL, Model(remat="none"), tokens, pairs) == 0
    full = 28 * 2 * tokens * (query + kv + out + 2 * up) + attention
    assert repeated_flops(MODEL, Model(remat="full"), tokens, pairs) == full
    saved = full - 28 * 2 * tokens * (query + kv)
    assert repeated_flops(MODEL, Model(remat="save_qkv_proj"), tokens, pairs) == saved
    assert repeated_flops(MODEL, Model(remat="minimal"), tokens, pairs) == attention


def test_more_is_kept_on_every_step_of_the_ladder():
    ladder = (
        "full", "save_qkv_proj", "save_dot_except_mlp", "save_dot_with_context_except_mlp",
        "minimal", "minimal_with_context", "none",
    )  # fmt: skip
    widths = [kept_width(MODEL, Model(remat=name), tensor=1) for name in ladder]
    assert widths[0] == 3584
    assert widths[1] == 3584 + 3584 + 1024
    assert widths[3] < widths[4]
    # The context is 3584 wide, less than the MLP that `minimal` adds.
    assert widths == sorted(widths)
    assert kept_width(MODEL, Model(remat="save_qkv_proj"), tensor=4) == 3584 + (3584 + 1024) / 4


def test_what_waits_on_the_host_is_neither_kept_nor_repeated():
    changes = {"decoder_layer_input": "offload", "query_proj": "offload", "mlp_up": "save"}
    settings = Model(remat="full", remat_tensors=changes)
    assert kept_width(MODEL, settings, tensor=1) == 18944
    full = repeated_flops(MODEL, Model(remat="full"), tokens=4096, pairs=0)
    less = 28 * 2 * 4096 * (3584 * 3584 + 3584 * 18944)
    assert repeated_flops(MODEL, settings, tokens=4096, pairs=0) == full - less


# Work


@pytest.mark.parametrize("mask", ["chunk", "row", "instruction"])
def test_work_is_that_of_the_batches(tmp_path, mask):
    """Oracle: the segment ids of every row of the epoch, as training reads them."""
    config = load_config(small_config(tmp_path), [f"data.mask={mask}", *ONE_EPOCH])
    assert work_of(config).source.startswith("assumed")
    dataset = open_data(config)  # prepares the cache
    plan = dataset.plan()
    rows = plan.epoch_plan(0).rows
    batch = dataset.batch_reader(plan).read(range(rows))
    lengths = [np.unique(row[row > 0], return_counts=True)[1] for row in batch.segment_ids]
    share = config.train.global_batch_rows / rows
    work = work_of(config)
    assert work.tokens == round((batch.segment_ids > 0).sum() * share)
    assert work.pairs == round(sum((n * (n + 1) // 2).sum() for n in lengths) * share)
    assert work.loss_tokens == round((batch.loss_weights > 0).sum() * share)
    assert work.steps == plan.total_steps


def test_useful_operations_are_those_of_the_work():
    work = dataclasses.replace(WORK, tokens=1000, pairs=5000, loss_tokens=600)
    flops = flops_of(CONFIG, MODEL, work, mesh_of())
    assert flops.useful == step_flops(MODEL, 1000, 5000, 600).total
    assert flops.useful < flops.usual < flops.executed
    # Without the data, all tokens count as tokens with loss.
    unknown = flops_of(CONFIG, MODEL, dataclasses.replace(work, loss_tokens=None), mesh_of())
    assert unknown.useful == step_flops(MODEL, 1000, 5000, 1000).total


@pytest.mark.parametrize(
    ("microbatch_rows", "shards", "counted"),
    [
        (2, 1, 160 / 4 * 8),  # all of them
        (2, 2, (2 * 60 + 2 * 50) / 4 * 8),
        (4, 2, 2 * 90 / 4 * 8),  # 10 + 60 and 50 + 40 in the two parts
        (8, 4, 4 * 90 / 8 * 8),  # the four rows twice
    ],
)
def test_the_part_with_the_most_loss_tokens_decides_how_many_logits_run(
    microbatch_rows, shards, counted
):
    work = dataclasses.replace(WORK, row_loss_tokens=np.array([10, 60, 50, 40]))
    assert work.logit_tokens(8, microbatch_rows, shards) == counted
    assert WORK.logit_tokens(8, microbatch_rows, shards) == WORK.tokens
    config = with_values(train={"microbatch_rows": 64})
    mesh = mesh_of(fsdp=64)  # 60 of each row of 4,096
    fewer = step_flops(MODEL, 0, 0, WORK.tokens - 64 * 60).total
    flops = [flops_of(config, MODEL, w, mesh).executed for w in (WORK, work)]
    assert flops[0] - flops[1] == fewer


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_weights_are_read_again_only_where_a_product_is_repeated(dtype, size):
    """Gathered weights: 28 layers of 3584 x (2 x 3584 + 1024) + 3 x 3584 x 18944 numbers."""
    weights = 28 * size * WEIGHTS
    for remat, passes in (("none", 3), ("minimal_with_context", 3), ("full", 4)):
        model = {"remat": remat, "compute_dtype": dtype}
        config = with_values(model=model, train={"microbatch_rows": 64})
        assert (
            hbm_traffic(config, MODEL, mesh_of(), Arguments(0, 0, 0), NOTHING) == passes * weights
        )


@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("full", 3)])
def test_frozen_weights_beside_adapters_are_read_once_less(remat, passes):
    settings = {"remat": remat, "compute_dtype": "bfloat16"}
    config = with_values(model=settings, train={"microbatch_rows": 64}, lora={"rank": 16})
    model = adapted(MODEL, config.lora)
    read = hbm_traffic(config, model, mesh_of(), Arguments(0, 0, 0), NOTHING)
    assert read == passes * 28 * 2 * WEIGHTS


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_collectives_carry_numbers_of_the_compute_dtype(dtype, size):
    """Of 8 microbatches: two gathers of the weights, and one of the states of 4,096 tokens."""
    config = with_values(model={"compute_dtype": dtype})
    sent = step_traffic(config, MODEL, mesh_of(fsdp=8))
    gathered = 2 * 28 * WEIGHTS / 8 + 4096 * 3584
    assert sent["all-gather"] == pytest.approx(8 * size * 7 * gathered)
    assert network_traffic(config, MODEL, mesh_of(data=2, fsdp=4), slices=2) == pytest.approx(
        8 * size * 28 * WEIGHTS / 4  # an all-reduce between two sends the operand once
    )


@pytest.mark.parametrize(
    ("remat", "tensor", "heads", "gathers"),
    [
        ("none", 1, 4, 1),
        ("full", 1, 4, 2),
        ("minimal_with_context", 1, 4, 2),  # what is gathered has no name to be kept by
        ("none", 2, 2, 1),
        ("none", 14, 28 // 14, 1),  # 4 KV heads do not divide: as many copies as query heads
        ("none", 8, 4, 1),  # nor do 28 query heads: all of them
    ],
)
def test_a_context_axis_gathers_keys_and_values(remat, tensor, heads, gathers):
    """A device sends its 2,048 tokens to the other one, and half of the sum of the gradients."""
    model = {"remat": remat, "compute_dtype": "bfloat16"}
    config = with_values(model=model, train={"microbatch_rows": 4, "global_batch_rows": 4})
    without = dataclasses.replace(MODEL, num_kv_heads=0)
    mesh = mesh_of(fsdp=4, tensor=tensor, context=2)
    sent = step_traffic(config, MODEL, mesh)
    keys = 28 * 2 * 2048 * heads * 128 * 2
    matrices = 28 * 2 * 2 * 3584 * 4 * 128 / tensor  # of the key and value projections
    plain = step_traffic(config, without, mesh)
    assert sent["all-gather"] - plain["all-gather"] == pytest.approx(
        gathers * keys + 2 * 7 / 8 * matrices
    )
    assert sent["reduce-scatter"] - plain["reduce-scatter"] == pytest.approx(
        keys + 7 / 8 * matrices
    )


def test_offloaded_tensors_go_to_the_host_and_back():
    """Input of 3,584 and query of 28 x 128 numbers a token, written and read, in 28 layers."""
    offload = {"decoder_layer_input": "offload", "query_proj": "offload"}
    model = {"compute_dtype": "bfloat16", "remat_tensors": offload}
    config = with_values(model=model, train={"microbatch_rows": 64})
    moved = 2 * 28 * 2 * 8 * 4096 * (3584 + 28 * 128)
    assert host_traffic(config, MODEL, mesh_of(fsdp=8)) == moved
    kept = hbm_traffic(config, MODEL, mesh_of(fsdp=8), Arguments(0, 0, 0), NOTHING)
    assert kept == moved + 4 * 28 * 2 * WEIGHTS
    plan = make_plan(config, MODEL, V5P, WORK)
    assert plan.host_bytes == moved
    assert f"to the host and back: {moved / GIB:.3f}" in describe_plan(plan, None)
    assert host_traffic(with_values(model={"compute_dtype": "bfloat16"}), MODEL, mesh_of()) == 0


# Memory


def test_memory_by_arithmetic():
    """7.6e9 parameters in float32 with two moments, over 8 devices."""
    plan = make_plan(CONFIG, MODEL, V5P, WORK)
    parameters = 7_615_616_512
    assert plan.arguments.parameters == pytest.approx(parameters * 4 / 8, rel=1e-3)
    assert plan.arguments.optimizer == pytest.approx(parameters * 8 / 8, rel=1e-3)
    parts = plan.temporaries
    assert parts["gradients"] == pytest.approx(2 * parameters * 4 / 8, rel=1e-3)  # accumulated
    assert parts["saved activations"] == 28 * 4096 * 3584 * 2
    assert plan.fits


def test_memory_of_what_is_trained():
    """Two microbatches, so that gradients are there twice, in float32 over 8 devices."""
    sizes = {path: math.prod(spec.shape) for path, spec in parameter_specs(MODEL).items()}
    layers = sum(size for path, size in sizes.items() if path.startswith("layers."))
    head = sizes["head.kernel"] + sizes["final_norm.scale"]

    def planned(*frozen):
        return make_plan(with_values(optimizer={"frozen": frozen}), MODEL, V5P, WORK).temporaries

    # The last 7 of 28 layers are trained; the stack is differentiated whole.
    some = planned("embedding", "layers.0-20")
    expected = 2 * head + 2 * layers * 7 / 28 + layers
    assert some["gradients"] == pytest.approx(expected * 4 / 8, rel=1e-3)
    assert some["saved activations"] == 28 * 4096 * 3584 * 2
    last = planned("embedding", "layers")
    assert last["gradients"] == pytest.approx(2 * head * 4 / 8, rel=1e-3)
    assert last["saved activations"] == 0
    assert planned("layers")["saved activations"] == some["saved activations"]


def test_a_plan_with_frozen_parameters_tells_no_bounds():
    plan = make_plan(CONFIG, MODEL, V5P, WORK)
    told = describe_plan(plan, 3)
    assert told.count("at least") == told.count("at most") == 2
    plan = make_plan(with_values(optimizer={"frozen": ["embedding"]}), MODEL, V5P, WORK)
    told = describe_plan(plan, 3)
    assert "at least" not in told
    assert "at most" not in told
    assert told.count("count all parameters as trained") == 1


@pytest.mark.parametrize(
    ("topology", "mesh", "dtype", "attention"),
    [
        ("h100:8", {}, "auto", "mosaic_gpu"),
        ("h200:8", {}, "auto", "mosaic_gpu"),
        ("h100:8", {}, "float32", "blockwise"),
        ("h100:8", {"fsdp": 4, "context": 2}, "auto", "blockwise"),
        ("a100:8", {}, "auto", "blockwise"),
        ("b200:8", {}, "auto", "blockwise"),
        ("a100:8", {}, "auto", "xla"),
        ("v5p:2x2x2", {"fsdp": 4, "context": 2}, "float32", "splash"),
    ],
)
def test_scores_take_memory_where_training_computes_attention_with_xla(
    topology, mesh, dtype, attention
):
    """The kernel for GPUs needs an H100, bfloat16 and whole rows (docs/attention.md)."""
    named = attention if attention == "xla" else "auto"
    config = with_values(model={"attention": named, "compute_dtype": dtype}, mesh=mesh)
    plan = make_plan(config, MODEL, parse_topology(topology, 1), WORK)
    scores = plan.temporaries["attention scores of a layer"]
    # A device has 8 / fsdp rows of 4096 / context queries.
    assert scores == (3 * 4 * 28 * 4096 * 4096 if attention == "xla" else 0)
    value = 4 if dtype == "float32" else 2
    assert plan.temporaries["saved activations"] == 28 * 4096 * 3584 * value


def test_xla_takes_a_part_of_a_gpu(monkeypatch):
    """The card has 80e9 bytes. A TPU gives all that its compiler grants."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    plan = make_plan(CONFIG, MODEL, parse_topology("h100:8", 1), WORK)
    assert plan.hbm_bytes == 60e9
    assert "XLA takes 75% of the card; XLA_CLIENT_MEM_FRACTION" in describe_plan(plan, None)
    assert "of the card" not in describe_plan(make_plan(CONFIG, MODEL, V5P, WORK), None)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")  # the old name
    assert parse_topology("h100:8", 1).chip.hbm_bytes == 64e9
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert parse_topology("h100:8", 1).chip.hbm_bytes == 72e9
    assert parse_topology("v5p:2x2x2", 1).chip.hbm_bytes == V5P.chip.hbm_bytes
    for wrong in ("90 %", "1.5", "nan"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=f"MEM_FRACTION={wrong} is no part"):
            parse_topology("h100:8", 1)


def test_the_cache_of_a_sampler():
    """28 layers, keys and values, 4 heads of 128, 2 bytes."""
    assert kv_cache_bytes(MODEL, rows=3, length=100, tensor=1) == 28 * 2 * 3 * 100 * 4 * 128 * 2
    assert kv_cache_bytes(MODEL, 1, 100, tensor=4) == 28 * 2 * 100 * 128 * 2
    assert kv_cache_bytes(MODEL, 1, 100, tensor=8) == 28 * 2 * 100 * 4 * 128 * 2  # not divided


def test_the_eval_step_is_that_of_the_held_out_evaluation(tmp_path):
    """It lowers for the mesh, takes one microbatch, and holds no optimizer."""
    config = load_config(small_config(tmp_path), ["mesh.fsdp=2", "mesh.tensor=2"])
    lowered = lower_step(config, preset("micro"), jax.devices()[:4], "eval")
    assert [value.shape for value in lowered.out_info] == [(2,)] * 3
    parameters, batch = lowered.args_info[0]
    assert len(jax.tree.leaves(parameters)) == len(parameter_specs(preset("micro")))
    assert batch.tokens.shape == (2, 256)
    plan = make_plan(config, preset("micro"), parse_topology("h100:4", 1), WORK, "eval")
    assert plan.arguments.optimizer == 0
    assert "gradients" not in plan.temporaries


def test_the_eval_plan_is_that_of_one_microbatch():
    """8 of 64 rows over 8 devices, six arrays of 4 bytes a token."""
    plan = make_plan(CONFIG, MODEL, V5P, WORK, "eval")
    assert plan.arguments.batch == 6 * 4 * 4096
    [line] = [x for x in describe_plan(plan, None).splitlines() if "temporaries" in x]
    assert line.endswith("  activations")


# Sweep


def test_a_sweep_tries_the_fastest_first_and_no_more_than_the_limit():
    tried = []

    def make(config):
        tried.append(config.model.remat)
        return make_plan(config, MODEL, V5P, full_rows(config, "a test"))

    found = candidates(CONFIG, MODEL, V5P, WORK, ("remat", "rows"))
    planned, left = sweep(found, make, compiles=True, limit=2)
    assert len(tried) == len(planned) == 2
    assert left == len(found) - 2
    times = [one.plan.roofline.step_s for one in planned]
    assert times == sorted(times)
    every = [one.estimate for one in found if one.estimate.fits]
    assert times[0] == min(plan.roofline.step_s for plan in every)


def test_what_needs_more_than_a_refused_setting_is_not_compiled():
    found = candidates(CONFIG, MODEL, V5P, WORK, ("rows",))
    assert len({one.estimate.peak_bytes for one in found}) > 1
    refused = Compiled(0, 200 * GIB, True, {}, 0, [], 1.0)
    tried = []

    def make(config):
        tried.append(config)
        return make_plan(config, MODEL, V5P, full_rows(config, "a test"), "train", refused)

    planned, left = sweep(found, make, compiles=True, limit=10)
    assert not any(one.plan.fits for one in planned)
    peaks = [make_plan(c, MODEL, V5P, full_rows(c, "a test")).peak_bytes for c in tried]
    assert peaks == sorted(set(peaks), reverse=True)
    assert left == 0


def test_the_last_compilation_goes_to_what_needs_least_memory():
    found = candidates(CONFIG, MODEL, V5P, WORK, ("remat", "mesh", "rows"))
    refused = Compiled(0, None, True, {}, 0, [], 1.0)
    tried = []

    def make(config):
        plan = make_plan(config, MODEL, V5P, WORK, "train", refused)
        tried.append(plan.peak_bytes)  # by arithmetic, since the refusal tells no figure
        return plan

    planned, left = sweep(found, make, compiles=True, limit=2)
    least = min(found, key=lambda one: one.estimate.peak_bytes).estimate
    first = found[0].estimate
    assert tried == [first.peak_bytes, least.peak_bytes]
    # On other meshes, and what needs less than the first on its mesh.
    assert first.mesh != least.mesh
    others = [one.estimate for one in found if one.estimate.mesh != least.mesh]
    assert left == sum(o.mesh != first.mesh or o.peak_bytes < first.peak_bytes for o in others) > 0
    text = describe_sweep(planned, left, "train")
    assert text.endswith(f"none of the 2 compiled fits; {left} others were not compiled "
                         "(--max-compiles)")  # fmt: skip
    assert "nothing fits" in describe_sweep(planned, 0, "train")


@pytest.mark.parametrize("error", [UserError, jax.errors.JaxRuntimeError])
def test_a_setting_that_does_not_compile_leaves_the_table_whole(error):
    found = candidates(CONFIG, MODEL, V5P, WORK, ("rows",))

    def make(config):
        if config == found[0].config:
            raise error("INTERNAL: it broke\nwith details")
        return make_plan(config, MODEL, V5P, WORK)

    planned, _ = sweep(found, make, compiles=True, limit=3)
    assert [one.fits for one in planned] == [True, True, False]
    [row] = [line for line in describe_sweep(planned, 0, "train").splitlines() if "broke" in line]
    assert row.endswith(f"{found[0].overrides[0]}: INTERNAL: it broke")


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        ("RESOURCE_EXHAUSTED: 3.50G required for HLO temporaries (3.50G) exceeds available HBM",
         int(3.5 * GIB)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", None),
    ],
)  # fmt: skip
def test_every_want_of_memory_is_a_refusal(monkeypatch, message, peak):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(compilation, "described_devices", lambda topology: [])
    monkeypatch.setattr(compilation, "lower_step", lambda *arguments: Lowered())
    compiled = compilation.compile_step(CONFIG, MODEL, V5P, "train")
    assert (compiled.refused, compiled.peak) == (True, peak)
    plan = make_plan(CONFIG, MODEL, V5P, WORK, "train", compiled)
    assert not plan.fits
    assert plan.peak_bytes == (peak or make_plan(CONFIG, MODEL, V5P, WORK).peak_bytes)


def test_settings_that_cannot_fit_are_left_out():
    """Qwen2.5-7B's state alone, 16 bytes a parameter with gradients, is 15 GB on 8 chips."""
    v5e = parse_topology("v5e:2x4", 1)
    assert not candidates(CONFIG, MODEL, v5e, WORK, ("remat", "rows"))


def test_a_sweep_offers_only_the_attention_that_the_chip_has():
    for topology, kernels in (
        ("h100:8", {"mosaic_gpu", "blockwise"}),
        ("a100:8", {"blockwise"}),
    ):
        found = candidates(CONFIG, MODEL, parse_topology(topology, 1), WORK, ("attention",))
        assert {one.config.model.attention for one in found} == kernels


def test_meshes_of_a_sweep_fill_the_slices():
    two = parse_topology("v5p:2x2x2", 2)
    found = candidates(CONFIG, MODEL, two, WORK, ("mesh", "rows"))
    assert {tuple(one.estimate.mesh[a] for a in ("data", "fsdp", "tensor")) for one in found} == {
        (2, 8, 1), (2, 4, 2), (2, 2, 4),
    }  # fmt: skip
    assert all(one.estimate.roofline.network_s > 0 for one in found)


def test_meshes_of_a_sweep_keep_the_context_axis():
    config = with_values(mesh={"fsdp": 4, "context": 2})
    found = candidates(config, MODEL, V5P, WORK, ("mesh", "rows"))
    assert {tuple(one.estimate.mesh.values()) for one in found} == {
        (1, 4, 1, 2), (1, 2, 2, 2), (1, 1, 4, 2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mesh": {"fsdp": 4, "context": 2}, "data": {"sequence_length": 4098}}, "4098 is not a"),
        ({"train": {"global_batch_rows": 4, "microbatch_rows": 4}}, "microbatch_rows"),
    ],
)
def test_a_sweep_without_a_valid_setting_says_why(values, message):
    with pytest.raises(UserError, match=message):
        candidates(with_values(**values), MODEL, V5P, WORK, ("rows",))


# The command


def test_the_json_is_the_contract(tmp_path, monkeypatch, capsys, environment):
    config = small_config(tmp_path)
    open_data(load_config(config))
    out = run(
        monkeypatch, capsys, "--config", config, "--topology", "h100:2", "--price", 3, "--json"
    )
    plan = json.loads(out)
    assert plan.keys() >= {
        "topology", "chips", "per_chip", "flops_per_step", "collectives", "roofline",
    }  # fmt: skip
    assert (plan["topology"], plan["chips"], plan["source"]) == ("h100:2", 2, "arithmetic")
    memory = plan["per_chip"]
    assert memory.keys() >= {
        "arguments_bytes", "temporaries_bytes", "peak_bytes", "hbm_bytes", "fits",
    }  # fmt: skip
    assert memory["peak_bytes"] == memory["arguments_bytes"] + memory["temporaries_bytes"]
    assert memory["fits"] is True
    assert plan["flops_per_step"] == plan["flops"]["useful"] < plan["flops"]["usual"]
    line = plan["roofline"]
    assert line["step_s"] == max(line["compute_s"], line["hbm_s"], line["ici_s"])
    assert 0 < line["mfu"] <= 1
    assert all(kind.keys() == {"count", "bytes"} for kind in plan["collectives"].values())
    run_ = plan["run"]
    assert run_["hours"] == pytest.approx(plan["work"]["steps"] * line["step_s"] / 3600)
    assert run_["usd"] == pytest.approx(run_["hours"] * 2 * 3)
    loss_tokens = plan["work"]["steps"] * plan["work"]["loss_tokens"]
    assert run_["usd_per_million_loss_tokens"] == pytest.approx(run_["usd"] / loss_tokens * 1e6)


def test_a_compilation_is_kept_and_shown(tmp_path, monkeypatch, capsys, environment):
    """What the compiler says takes the place of the arithmetic, and is asked for once."""
    path = small_config(tmp_path, mesh={"fsdp": 2, "tensor": 2})
    config, topology = load_config(path), parse_topology("v5p:2x2x1", 1)
    kinds = {"all-gather": {"count": 7, "bytes": 2.0 * GIB, "operand_bytes": GIB}}
    compiled = Compiled(3 * GIB, 8 * GIB, False, kinds, 0, [("f32[9] gradient", GIB)], 60.0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    calls = []

    def compile_step(*arguments):
        calls.append(arguments)
        return compiled

    monkeypatch.setattr("moi_jax.accounting.planner.compile_step", compile_step)
    texts = [run(monkeypatch, capsys, "--config", path, "--topology", "v5p:2x2x1") for _ in "12"]
    assert len(calls) == 1
    assert texts[0] == texts[1]
    assert "peak                8.00  of 95.74: fits, +87.74" in texts[0]
    assert "all-gather             2.000  in 7" in texts[0]
    assert read_kept(kept_path(config, preset("micro"), topology, "train")) == compiled
    same = load_config(
        path, ["train.seed=7", "train.compilation_cache=null", "train.sample_every=3"]
    )
    assert read_kept(kept_path(same, preset("micro"), topology, "train")) == compiled
    for override in ("model.remat=full", "mesh.fsdp=4", "train.microbatch_rows=1"):
        other = load_config(path, [override])
        assert read_kept(kept_path(other, preset("micro"), topology, "train")) is None


def test_what_the_compiler_refuses_does_not_fit(tmp_path, monkeypatch, capsys, environment):
    """Even if there is less of it than the chip has: what is free may be in pieces."""
    path = small_config(tmp_path, mesh={"fsdp": 2, "tensor": 2})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    refused = Compiled(0, 10 * GIB, True, {}, 0, [], 5.0)
    monkeypatch.setattr("moi_jax.accounting.planner.compile_step", lambda *arguments: refused)
    arguments = ("--config", path, "--topology", "v5e:2x2")
    memory = json.loads(run(monkeypatch, capsys, *arguments, "--json"))["per_chip"]
    assert memory["fits"] is False
    assert memory["peak_bytes"] == 10 * GIB
    text = run(monkeypatch, capsys, *arguments)
    assert "DOES NOT FIT" in text
    assert "the largest, by arithmetic" in text


def test_a_sweep_prints_the_command_that_trains_the_best(
    tmp_path, monkeypatch, capsys, environment
):
    path = small_config(tmp_path)
    text = run(
        monkeypatch, capsys, "--config", path, "--topology", "h100:2", "--sweep", "remat,rows",
        "--max-compiles", 3, "train.seed=1", "logging.run_dir=a run",
    )  # fmt: skip
    last = text.strip().splitlines()[-1]
    command = shlex.split(last)
    assert command[:5] == ["python", "-m", "moi_jax.train", "--config", str(path)]
    assert command[5:7] == ["train.seed=1", "logging.run_dir=a run"]
    assert command[7].startswith("model.remat=")
    assert text.count("\nyes") == 3


def test_a_plan_names_a_faster_remat_that_fits(tmp_path, monkeypatch, capsys, environment):
    """Oracle: the first line of the sweep that it advises."""
    large = ("model.preset=qwen2.5-7b", "data.sequence_length=4096", "train.global_batch_rows=8")
    arguments = ("--config", small_config(tmp_path), "--topology", "h100:8", "mesh.fsdp=8", *large)
    text = run(monkeypatch, capsys, *arguments, "model.remat=full")
    [hint] = [line for line in text.splitlines() if "try --sweep remat" in line]
    table = run(monkeypatch, capsys, *arguments, "model.remat=full", "--sweep", "remat")
    best = next(line for line in table.splitlines() if line.startswith("yes")).split()
    assert hint.startswith(f"by arithmetic {best[-1]} fits too")
    assert f"at least {float(best[3]):.3g} s a step instead of " in hint
    assert "--sweep" not in run(monkeypatch, capsys, *arguments, best[-1])


def test_no_remat_is_named_that_gains_little_or_nothing():
    replace = dataclasses.replace

    def named(plan_of=lambda plan: plan, **sections):
        config = with_values(train={"microbatch_rows": 64}, **sections)
        planner = Planner(config, parse_topology("b200:8", 1), "train")
        plan = planner.plan()
        assert plan.roofline.bound == "compute"
        return planner.faster_remat(plan_of(plan))

    full = {"remat": "full"}
    assert named(model=full)
    # As the compiled program, which may send more than the arithmetic knows.
    assert not named(lambda p: replace(p, roofline=replace(p.roofline, ici_s=1e9)), model=full)
    assert not named(model=full, optimizer={"frozen": ["embedding"]})
    # `minimal` repeats the attention, which is little in short rows.
    assert not named(model={"remat": "minimal"}, data={"sequence_length": 512})


def test_a_sampler_is_planned_by_arithmetic(tmp_path, monkeypatch, capsys, environment):
    arguments = ("--config", small_config(tmp_path), "--topology", "v5e:2x2", "--step", "generate")
    plan = json.loads(run(monkeypatch, capsys, *arguments, "--json"))
    micro = preset("micro")
    assert plan["kv_cache"]["bytes_per_row"] == kv_cache_bytes(micro, 1, 256, 1)
    assert plan["per_chip"]["optimizer_bytes"] == 0
    assert "KV cache" in run(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "'v9:2x2' is unknown.* Known: v4, v5e, v5p"),
        (["--topology", "v5p"], "is unknown; give NAME:SHAPE"),
        (["--topology", "h100:2x4"], "such as h100:8"),
        (["--topology", "h100:0"], "has no chips"),
        (["--topology", "h100:8", "--sweep", "remat,color"], "'color' is unknown"),
        (["--topology", "h100:8", "--sweep", "remat", "--step", "eval"], "leave out --step"),
        (["--topology", "h100:8", "mesh.fsdp=3"], "does not fill the 8 devices"),
        (["--topology", "h100:3", "train.microbatch_rows=2"], "not a multiple of the 3"),
        (
            ["--topology", "h100:6", "mesh.fsdp=2", "mesh.context=3"],
            "data.sequence_length 256 is not a multiple of 6",
        ),
        (["--topology", "a100:2", "model.attention=mosaic_gpu"], "on a100: .* this GPU's is 8.0"),
        (["--topology", "v5p:2x2x2"], "libtpu, the compiler of the TPU, is not installed"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, environment, arguments, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = small_config(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan", "--config", str(path), *arguments])
    with pytest.raises(UserError, match=message) as error:
        command.main()
    assert "\n" not in str(error.value)


def test_lora_holds_the_base_once_in_bfloat16_and_moments_of_adapters_alone():
    own_config = with_values(lora={"rank": 16})
    model = adapted(MODEL, own_config.lora)
    own, full = make_plan(own_config, model, V5P, WORK), make_plan(CONFIG, MODEL, V5P, WORK)
    adapters = 28 * 16 * (2 * (2 * 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert sum(math.prod(p.shape) for p in parameter_specs(model).values() if p.adapter) == adapters
    # bfloat16; of A or B the side of the heads or of the MLP is whole on each device of fsdp.
    base = full.arguments.parameters / 2
    assert base + 4 * adapters / 8 <= own.arguments.parameters <= base + 4 * adapters
    assert adapters < own.arguments.optimizer < 8 * adapters
    assert own.temporaries["gradients"] <= 8 * adapters  # twice: they add up
    assert own.peak_bytes < full.peak_bytes / 2
    assert own.flops.executed / full.flops.executed == pytest.approx(0.75, abs=0.02)
    sent = [plan.collectives["reduce-scatter"]["bytes"] for plan in (own, full)]
    assert sent[0] < 0.2 * sent[1]


def test_the_price_list_has_both_methods_and_the_smallest_chips():
    topology = parse_topology("v5e:2x2", 1)
    config = with_values(train={"microbatch_rows": 4}, model={"attention": "auto"})
    offers = price_list(config, MODEL, topology, WORK)
    assert [offer.method for offer in offers] == ["full", "LoRA, rank 16"]
    assert [offer.plan.fits for offer in offers] == [False, True]
    assert [offer.smallest["v5e"] for offer in offers] == ["v5e:4x4", "v5e:2x2"]
    table = describe_offers(offers).splitlines()
    assert table[2].split()[:3] == ["full", "7.09", "14.19"]  # 4 and 8 bytes a parameter of 4 chips
    assert "yes" in table[3]
    assert offers_json(offers)[1]["smallest"]["h100"] == "h100:1"


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("nf4", 4 + 32 / 64)])
def test_the_price_list_of_a_quantised_base_has_a_row_more(scheme, bits):
    config = with_values(model={"attention": "auto"}, lora={"rank": 16, "base_dtype": scheme})
    model = adapted(MODEL, config.lora)
    offers = price_list(config, model, parse_topology("l4:1", 1), WORK)
    assert [offer.method for offer in offers] == [
        "full", "LoRA, rank 16", f"QLoRA {scheme}, rank 16",
    ]  # fmt: skip
    plain, coded = (offer.plan.arguments.parameters for offer in offers[1:])
    saved = MODEL.num_layers * WEIGHTS * (16 - bits) / 8
    assert plain - coded == pytest.approx(saved, rel=2e-3)  # int8 has an absmax for each output


def test_the_largest_buffers_are_also_those_of_branches():
    def loop(x, needed):
        def branch(x):
            return jnp.tanh(x @ x) @ x

        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.cond(needed, branch, lambda x: x, x), x)

    text = jax.jit(loop).lower(jnp.ones((8, 8)), True).compile().as_text()
    found = largest_buffers(text)
    assert any("branch" in name and size == 4 * 8 * 8 for name, size in found), found
    assert not any("conditional" in name for name, _ in found)
