"""The table of shardings, and the one line about what a mesh does not divide."""

import dataclasses
import re
import sys

import jax
import pytest
from flax import traverse_util

from moi_jax import config as config_lib
from moi_jax import train as command
from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.common.errors import UserError
from moi_jax.common.log import LogTable
from moi_jax.config.load import load_config
from moi_jax.models.parameters import parameter_shardings
from moi_jax.models.trained import trained_parameters
from moi_jax.parallel.mesh import make_mesh
from moi_jax.training import train as train_lib
from moi_jax.training.sharding import print_sharding as print_sharding_of
from moi_jax.training.sharding import sharding_table, undivided_line

from support.runs import ROOT, small_config
from support.trainer import MODEL, initial_parameters


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"tensor": 4, "context": 2}], ids=str)
def test_the_table_tells_the_bytes_that_a_device_holds(axes):
    mesh = make_mesh(config_lib.Mesh(**{"fsdp": 1} | axes), jax.devices())
    placed = jax.device_put(initial_parameters("float32"), parameter_shardings(MODEL, mesh))
    held = {
        path: array.addressable_shards[0].data.nbytes
        for path, array in traverse_util.flatten_dict(placed, sep=".").items()
    }
    table = sharding_table(MODEL, mesh.shape, "float32", trained_parameters(MODEL))
    lines = str(LogTable(table)).splitlines()
    told = {cells[1]: int(cells[-2].replace(",", "")) for cells in map(cells_of, lines[4:-1])
            if len(cells) > 1}  # fmt: skip
    assert told == held | {"all": sum(held.values())}


def cells_of(line):
    return [cell.strip() for cell in re.split("[│┃]", line)]


def test_what_a_mesh_does_not_divide_is_told_in_one_line_with_every_parameter():
    line = undivided_line(MODEL, {"data": 1, "fsdp": 2, "tensor": 4, "context": 1})
    paths = [f"layers.attention.{name}.{part}" for name in ("key", "value")
             for part in ("bias", "kernel")]  # fmt: skip
    told = f"the mesh does not divide kv_heads 2 over tensor 4 ({', '.join(paths)}): "
    assert line.startswith(told)
    assert undivided_line(MODEL, {"data": 8, "fsdp": 2, "tensor": 2, "context": 2}) is None
    odd = dataclasses.replace(MODEL, vocab_size=66)
    assert "vocab 66 over tensor 4 (embedding.table, head.kernel)" in undivided_line(
        odd, {"data": 1, "fsdp": 1, "tensor": 4, "context": 1}
    )


def test_a_table_for_devices_that_are_not_there_asks_for_none(capsys, monkeypatch):
    monkeypatch.setattr(jax, "devices", None)
    printed = print_sharding(monkeypatch, capsys, "mesh.data=2", "mesh.fsdp=96")
    assert "data 2 x fsdp 96 x tensor 1 x context 1" in printed
    assert re.search(r"embedding.table .* 151936 x 4096 .* vocab, embed .* -, - ", printed)
    assert "does not divide embed 4096 over fsdp 96" in printed


def print_sharding(monkeypatch, capsys, *overrides):
    config = str(ROOT / "configs" / "qwen_7b_moi.yaml")
    monkeypatch.setattr(sys, "argv", ["train", "--config", config, "--print-sharding", *overrides])
    assert command.main() == 0
    return capsys.readouterr().out


def test_the_table_tells_what_is_trained(capsys, monkeypatch):
    frozen = "optimizer.frozen=[embedding, layers.4-6.mlp.up, layers.8.mlp.up]"
    printed = print_sharding(monkeypatch, capsys, "mesh.fsdp=8", frozen)
    told = {cells[1]: cells[-3] for cells in map(cells_of, printed.splitlines()) if len(cells) > 5}
    assert told["embedding.table"] == "no"
    assert told["head.kernel"] == "yes"
    assert told["layers.mlp.up.kernel"] == "layers 0-3, 7, 9-31"


@pytest.mark.parametrize("act", [train_lib.train, print_sharding_of])
def test_a_pattern_that_fits_no_parameter_is_refused_before_data_is_read(
    act, tmp_path, monkeypatch
):
    config = load_config(small_config(tmp_path, optimizer={"frozen": "embeding"}))
    monkeypatch.setattr(train_lib, "open_dataset", None)
    with pytest.raises(UserError, match="'embeding'; --print-sharding "):
        act(config)


def test_training_warns_once_of_what_its_mesh_does_not_divide(tmp_path, log_text):
    experiment = opened(tmp_path, {"tensor": 8})
    train_lib.model_on_mesh(experiment.config, experiment.model, jax.devices())
    assert log_text.getvalue().count("the mesh does not divide") == 1


def test_training_refuses_rows_that_the_context_axis_cannot_cut(tmp_path):
    experiment = opened(tmp_path, {"fsdp": 1, "context": 5})
    with pytest.raises(UserError, match=r"data.sequence_length 256 is not a multiple of 10"):
        train_lib.model_on_mesh(experiment.config, experiment.model, jax.devices())


def opened(directory, mesh):
    return open_experiment(load_config(small_config(directory, mesh=mesh))).on_platform("cpu")
