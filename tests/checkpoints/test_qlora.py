"""Checkpoints of adapters beside a quantised base: the base that they name, resume and export."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import moi_jax
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.items import find_step, read_items
from moi_jax.checkpoints.merged import stored_fingerprint
from moi_jax.checkpoints.opener import open_checkpoint
from moi_jax.checkpoints.parameter_files import StoredParameters
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.models.decoding import LayerViews
from moi_jax.models.parameters import parameter_specs

from support.published import micro_published
from support.runs import parameters, refusal, same_parameters, small_config, train_here

TOKENS = np.arange(24).reshape(2, 12) * 17 % 500


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora")
    micro_published(folder / "Tiny", ml_dtypes.bfloat16, num_layers=2)
    import_checkpoint(folder / "Tiny", folder / "base")
    return folder


def config_of(folder, base, **sections):
    folder.mkdir()
    values = {
        "model": {"preset": None, "init_from": base, "remat": "none"},
        "tokenizer": {"path": None},
        "lora": {"rank": 4, "base_dtype": "int8"},
        "train": {"steps": 4, "global_batch_rows": 2},
        "checkpoint": {"every": 2, "keep_last": 3},
    }
    return small_config(folder, **{**values, **sections})


@pytest.fixture(scope="module")
def config(place):
    return config_of(place / "whole", str(place / "base"))


@pytest.fixture(scope="module")
def run(config):
    return train_here(config, make_evaluations=None).directory


def logits(path, **options):
    model, _ = moi_jax.load(path, **options)
    return np.asarray(model(TOKENS))


def test_a_checkpoint_holds_adapters_alone_and_the_fingerprint_of_the_exact_base(place, run):
    step = find_step(run)
    items = read_items(step)
    stored = stored_parameters(step, items.model)
    assert all(path.endswith(("lora_a", "lora_b")) for path in stored.arrays)
    base = stored_parameters(place / "base", items.model.base)
    assert items.base.fingerprint == stored_fingerprint(base, items.model.base)
    assert items.model.adapter.quantization == "int8"


def test_a_run_goes_on_bit_for_bit_and_only_with_the_same_base_dtype(config, run):
    whole = parameters(run)
    newest = find_step(run)
    for file in sorted(newest.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    newest.rmdir()
    assert find_step(run).name == "2"
    train_here(config, make_evaluations=None)
    assert find_step(run).name == "4"
    same_parameters(parameters(run), whole)
    assert "lora.base_dtype: int8 -> float32" in refusal(config, "lora.base_dtype=auto")


def test_an_export_is_the_quantised_base_with_its_adapters_merged(place, run, tmp_path):
    export_checkpoint(run, tmp_path / "merged", dtype="float32")
    import_checkpoint(tmp_path / "merged", tmp_path / "again")
    np.testing.assert_allclose(logits(tmp_path / "again"), logits(run), atol=2e-5)


def test_layers_for_decoding_keep_their_codes(run):
    opened = open_checkpoint(run, devices=jax.devices()[:1], dtype="bfloat16", by_layer=True)
    assert isinstance(opened.parameters, LayerViews)
    up = opened.parameters.layers[0]["mlp"]["up"]
    assert {name: up[name].dtype for name in ("codes", "absmax", "lora_a")} == {
        "codes": jnp.int8, "absmax": jnp.float32, "lora_a": jnp.bfloat16,
    }  # fmt: skip


def test_matrices_of_the_base_are_on_the_device_one_at_a_time(run, monkeypatch):
    """As many bytes as the base has in bfloat16 need not fit a device that trains beside codes."""
    model = read_items(find_step(run)).model
    specs = parameter_specs(model.base).items()
    stacks = {p.shape for path, p in specs if path.startswith("layers.") and p.contracted}
    get, alive = StoredParameters.get, []

    def watched(stored, path, layer=None):
        alive.append(sum(x.shape in stacks for x in jax.live_arrays() if x.dtype == jnp.bfloat16))
        return get(stored, path, layer)

    monkeypatch.setattr(StoredParameters, "get", watched)
    moi_jax.load(run, dtype="bfloat16")
    assert len(alive) == len(specs)
    assert max(alive) <= alive[0]  # what other tests have left


def test_random_parameters_are_not_quantised(tmp_path):
    config = config_of(
        tmp_path / "random", None, model={"preset": "tiny", "remat": "none"},
        tokenizer={},
    )  # fmt: skip
    assert "lora.base_dtype int8 quantises a base; name it in model.init_from" in refusal(config)
