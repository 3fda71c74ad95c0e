"""Checkpoints of adapters: what they hold, how they find their base, resume and export."""

import contextlib
import itertools
import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moi_jax
from moi_jax.checkpoints.base import tree_fingerprint
from moi_jax.checkpoints.checksums import write_checksums
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.hf.peft_exporter import export_adapter
from moi_jax.checkpoints.hf.peft_importer import import_adapter
from moi_jax.checkpoints.items import find_step, read_items
from moi_jax.checkpoints.opener import open_checkpoint
from moi_jax.checkpoints.parameters import read_beside, stored_parameters
from moi_jax.common.errors import UserError
from moi_jax.models.parameters import parameter_specs
from moi_jax.training import train
from moi_jax.training.audit import saved_run
from moi_jax.training.audit.audit import AuditOptions, audit
from moi_jax.training.audit.finding import FAILED, OK

from support.adapters import save_adapters
from support.published import micro_published, tensors
from support.runs import (
    parameters,
    refusal,
    same_parameters,
    small_config,
    train_here,
    train_until,
)

LAYERS = 2
TOKENS = np.arange(24).reshape(2, 12) * 17 % 500


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Published weights in bfloat16, and the checkpoint that is made of them."""
    folder = tmp_path_factory.mktemp("lora")
    micro_published(folder / "Tiny", ml_dtypes.bfloat16, num_layers=LAYERS)
    import_checkpoint(folder / "Tiny", folder / "base")
    return folder


def lora_config(folder: Path, base: Path) -> Path:
    folder.mkdir()
    return small_config(
        folder,
        model={"preset": None, "init_from": str(base), "remat": "none"},
        tokenizer={"path": None},
        lora={"rank": 4},
        train={"steps": 20, "global_batch_rows": 2},
        checkpoint={"every": 4},
    )


def train_quickly(config: Path, *overrides: str) -> Path:
    """Trains without evaluations, and returns the run directory."""
    return train_here(config, *overrides, make_evaluations=None).directory


@pytest.fixture(scope="module")
def run(place):
    """A run that begins from the base."""
    return train_quickly(lora_config(place / "whole", place / "base"))


def logits(path, **options):
    model, _ = moi_jax.load(path, **options)
    return np.asarray(model(TOKENS))


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_holds_the_adapters_and_names_the_base(place, run):
    step = find_step(run)
    items = read_items(step)
    held = stored_parameters(step, items.model).arrays
    assert held.keys() == {p for p, spec in parameter_specs(items.model).items() if spec.adapter}
    assert items.base.name == str(place / "base")
    assert Path(items.base.path) == place / "base"
    size = sum(file.stat().st_size for file in (step / "parameters").rglob("*") if file.is_file())
    whole = [file for file in (place / "base" / "parameters").rglob("*") if file.is_file()]
    assert size < sum(file.stat().st_size for file in whole) / 2


def test_a_loaded_run_is_its_base_with_trained_adapters(place, run):
    trained, base = parameters(run), parameters(place / "base")
    assert {name for name in trained if "lora" not in name} == base.keys()
    same_parameters({name: trained[name] for name in base}, base)
    assert all(np.any(trained[name]) for name in trained if name.endswith("['lora_b']"))
    assert not np.allclose(logits(run), logits(place / "base"), atol=1e-4)


def test_a_run_that_is_killed_resumes_bit_for_bit_and_may_save_its_base(place, run):
    config = lora_config(place / "killed", place / "base")
    # The save of step 8 has waited for that of step 4, from which the run can go on.
    assert train_until(config, 9, signal.SIGKILL) == -signal.SIGKILL
    again = train_quickly(config, "checkpoint.save_base=true")
    same_parameters(parameters(again), parameters(run))
    assert read_items(again).base is None
    assert read_items(run).base is not None


def test_a_local_copy_holds_the_adapters_and_goes_on_beside_the_base(
    place, run, monkeypatch, tmp_path, log_text
):
    """Step 16 is in the run directory; the run fails after step 18, of which no copy is made."""
    monkeypatch.setattr(train, "check_replicas", lambda mesh: None)
    config = lora_config(place / "failed", place / "base")
    shutil.copytree(run, config.parent / "run")
    shutil.rmtree(config.parent / "run" / "checkpoints" / "20")
    overrides = ("checkpoint.local_every=1", f"checkpoint.local_dir={tmp_path}")

    calls = itertools.count(17)

    def fail_after_18() -> bool:
        return next(calls) == 18 and 1 / 0

    stop = contextlib.nullcontext(fail_after_18)
    with pytest.raises(ZeroDivisionError):
        train_here(config, *overrides, make_evaluations=None, stop=stop)
    (copy,) = tmp_path.glob("*/17.*/0/0.npz")
    with np.load(copy) as arrays:
        held = [name for name in arrays.files if name.startswith("[0]")]  # the parameters
    assert held
    assert all("lora" in name for name in held)
    train_quickly(config, *overrides)
    assert "resuming from step 17" in log_text.getvalue()
    same_parameters(parameters(config.parent / "run"), parameters(run))


def test_a_copy_of_the_base_serves_in_any_dtype_and_another_model_does_not(place, run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(find_step(run), moved)
    item = json.loads((moved / "base" / "metadata").read_text())
    item["path"] = str(tmp_path / "gone")
    (moved / "base" / "metadata").write_text(json.dumps(item))
    write_checksums(moved)
    with pytest.raises(UserError, match="holds adapters alone, and their base") as gone:
        moi_jax.load(moved)
    assert "--base" in one_line(gone)
    with pytest.raises(UserError, match="holds adapters alone, and their base"):
        export_checkpoint(moved, tmp_path / "exported")
    import_checkpoint(place / "Tiny", tmp_path / "float32", dtype="float32")
    np.testing.assert_array_equal(logits(moved, base=tmp_path / "float32"), logits(run))
    opened = open_checkpoint(moved, devices=jax.devices()[:1], base=place / "Tiny")  # published
    np.testing.assert_array_equal(opened.bind(opened.parameters)(TOKENS), logits(run))

    other = micro_published(tmp_path / "Other", np.float32, num_layers=LAYERS)
    held = load_file(other / "model.safetensors")
    held["lm_head.weight"][3, 5] += 0.01
    save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(other, tmp_path / "other")
    with pytest.raises(UserError, match="is not the base of the adapters in") as different:
        moi_jax.load(moved, base=tmp_path / "other")
    assert str(place / "base") in one_line(different)
    with pytest.raises(UserError, match="holds all parameters"):
        moi_jax.load(place / "base", base=place / "base")


def test_a_fingerprint_is_that_of_the_values_in_any_dtype_and_on_any_mesh():
    values = {"kernel": jax.random.normal(jax.random.key(0), (8, 5, 3)), "bias": jnp.arange(6.0)}
    own = tree_fingerprint(values)
    assert own == tree_fingerprint(jax.tree.map(lambda x: x.astype(jnp.bfloat16), values))
    mesh = jax.make_mesh((8,), ("fsdp",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    assert own == tree_fingerprint({**values, "kernel": jax.device_put(values["kernel"], split)})
    others = (
        values["kernel"].at[3, 1, 2].multiply(1.01),
        values["kernel"].at[3, 1, 2].multiply(-1),
        values["kernel"][::-1],
        values["kernel"].swapaxes(1, 2).reshape(8, 5, 3),
    )
    assert len({own, *(tree_fingerprint({**values, "kernel": k}) for k in others)}) == 5


def test_a_run_goes_on_with_adapters_only_if_the_config_has_them(place, run):
    config = lora_config(place / "further", run)
    assert "has adapters of rank 4" in refusal(config, "lora.rank=8")
    assert "has adapters of rank 4" in refusal(config, "lora.rank=0")
    further = train_quickly(config, "train.steps=1", "optimizer.learning_rate=1e-9")
    assert read_items(further).base == read_items(run).base
    np.testing.assert_allclose(logits(further), logits(run), atol=1e-4)


def test_an_audit_reads_a_base_that_has_moved_once(place, run, tmp_path, monkeypatch):
    moved = place / "moved"
    (place / "base").rename(moved)
    reads = []

    def counted(*arguments, **options):
        reads.append(options["given"])
        return read_beside(*arguments, **options)

    monkeypatch.setattr(saved_run, "read_beside", counted)

    def findings(base):
        options = AuditOptions(run, out=tmp_path / "out", rows=1, steps=4, base=base)
        return audit(options, jax.devices()[:1]).findings

    try:
        without, found = findings(None), findings(moved)
    finally:
        moved.rename(place / "base")
    assert without["values"].verdict == FAILED
    assert "name a copy or the published weights: --base" in without["values"].text
    assert {found[name].verdict for name in ("values", "segments", "replay")} == {OK}
    assert len(list((run / "checkpoints").iterdir())) > 1
    assert reads == [None, moved]


def test_another_rank_is_another_run(place, run):
    config = place / "whole" / "config.yaml"
    assert "was started with another setting (lora.alpha: 32.0 -> 16.0)" in refusal(
        config, "lora.alpha=16"
    )


def test_an_export_has_the_adapters_merged(place, tmp_path):
    adapters = save_adapters(place / "base", tmp_path / "adapters", scaling="rslora")
    export_checkpoint(adapters, tmp_path / "merged", dtype="float32")
    import_checkpoint(tmp_path / "merged", tmp_path / "again")
    np.testing.assert_allclose(logits(tmp_path / "again"), logits(adapters), atol=2e-5)
    assert np.abs(logits(adapters) - logits(place / "base")).max() > 0.01
    export_checkpoint(adapters, tmp_path / "narrow")  # as its base is stored
    assert {tensor.dtype for tensor in tensors(tmp_path / "narrow").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }


def test_a_fused_tensor_carries_the_adapters_of_its_parts_as_blocks(place, tmp_path):
    targets = ("*.query", "*.value", "layers.mlp.down")
    adapters = save_adapters(place / "base", tmp_path / "adapters", targets=targets)
    export_adapter(adapters, tmp_path / "peft")
    export_checkpoint(adapters, tmp_path / "merged", dtype="float32")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_attn", "mlp.c_proj"]
    assert config["rank_pattern"] == {"attn.c_attn": 8}
    held, merged = (
        load_file(tmp_path / "peft" / "adapter_model.safetensors"),
        tensors(tmp_path / "merged"),
    )
    base = tensors(place / "Tiny")
    for layer in range(LAYERS):
        for module, rank, alpha in (("attn.c_attn", 8, 64.0), ("mlp.c_proj", 4, 32.0)):
            name = f"transformer.h.{layer}.{module}"
            a, b = (held[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
            assert a.shape[0] == b.shape[1] == rank
            assert config["alpha_pattern"].get(module, config["lora_alpha"]) == alpha
            update = merged[f"{name}.weight"] - base[f"{name}.weight"].astype(np.float32)
            np.testing.assert_allclose(alpha / rank * b @ a, update, atol=1e-6)
    assert not (tmp_path / "peft" / "config.json").exists()


def test_an_adapter_that_is_exported_and_imported_is_the_same(place, tmp_path):
    targets = ("layers.mlp", "layers.attention.out")
    adapters = save_adapters(place / "base", tmp_path / "adapters", targets=targets)
    export_adapter(adapters, tmp_path / "peft")
    import_adapter(tmp_path / "peft", place / "base", tmp_path / "again")
    same_parameters(parameters(tmp_path / "again"), parameters(adapters))
    assert read_items(tmp_path / "again").model == read_items(adapters).model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora True is not supported; merge the adapter with peft"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"rank_pattern": {"up": 2}}, "rank_pattern {'up': 2} is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"peft_type": "IA3"}, "is of no LoRA adapter (peft_type)"),
        ({"r": 0}, "r is 0, not a number above zero"),
        ({"r": 5}, "has shape (4, 192)"),
    ],
)
def test_an_adapter_with_other_features_is_refused_by_name(place, tmp_path, change, message):
    adapters = save_adapters(place / "base", tmp_path / "adapters", targets=("*.down",))
    export_adapter(adapters, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as error:
        import_adapter(tmp_path / "peft", place / "base", tmp_path / "out")
    assert message in one_line(error)
    assert not (tmp_path / "out").exists()


def test_peft_files_without_adapters_are_refused(place, tmp_path):
    with pytest.raises(UserError, match="has no adapters for peft"):
        export_adapter(place / "base", tmp_path / "peft")
