"""Adapters whose base has moved, was replaced, or is named by other adapters."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

import moi_jax
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.hf.verify import verify_checkpoint
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.moved_base import read_base_again
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config
from moi_jax.models.parameters import abstract_parameters, base_of, parameter_shardings
from moi_jax.parallel import hosts

from support.adapters import save_adapters
from support.published import micro_published
from support.runs import small_config

TOKENS = np.arange(24).reshape(2, 12) * 17 % 500


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, adapters beside it, and another model of the same shapes."""
    folder = tmp_path_factory.mktemp("moved")
    micro_published(folder / "Tiny", ml_dtypes.bfloat16, num_layers=1)
    import_checkpoint(folder / "Tiny", folder / "base")
    save_adapters(folder / "base", folder / "adapters")
    export_checkpoint(folder / "adapters", folder / "merged")
    import_checkpoint(folder / "merged", folder / "other")
    return folder


def logits(path, **options):
    model, _ = moi_jax.load(path, **options)
    return np.asarray(model(TOKENS))


def read_again(place, tmp_path, recorded, named):
    """What a resumed run reads whose base was at `recorded`, and whose model.init_from is `named`.

    Returns the parameters and the place where they were.
    """
    model = {"preset": None, "init_from": str(place / named), "remat": "none"}
    path = small_config(tmp_path, model=model, tokenizer={"path": None}, lora={"rank": 4})
    items, mesh = read_items(place / "adapters"), jax.make_mesh((1,), ("fsdp",))
    wanted = jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding),
        abstract_parameters(items.model, "float32"),
        parameter_shardings(items.model, mesh),
    )
    base = replace(items.base, path=str(place / recorded))
    read, found = read_base_again(
        place / "adapters", base, load_config(path, []), items.model, wanted
    )
    assert jax.tree.structure(read) == jax.tree.structure(base_of(items.model, wanted))
    return read, found.path


@pytest.mark.parametrize(
    ("recorded", "named"),
    [
        ("base", "gone"),  # it is where it was
        ("gone", "base"),
        ("other", "base"),
        ("gone", "adapters"),  # which name it
    ],
)
def test_a_resumed_run_finds_its_base(place, tmp_path, recorded, named):
    read, found = read_again(place, tmp_path, recorded, named)
    assert found == str(place / "base")
    held = moi_jax.load(place / "base")[0]
    np.testing.assert_array_equal(read["embedding"]["table"], held.embedding.table[...])


def test_a_base_that_is_at_neither_place_is_refused(place, tmp_path):
    with pytest.raises(UserError, match="is not the base of the adapters in"):
        read_again(place, tmp_path, "gone", "other")


def test_processes_go_to_the_same_place(place, tmp_path, monkeypatch):
    """Another process does not see the base, so this one reads where model.init_from is, too."""
    import_checkpoint(place / "Tiny", tmp_path / "copy")
    others = SimpleNamespace(gather=lambda what, here: [here, "false"])
    monkeypatch.setattr(hosts, "_hosts", others)
    assert not hosts.in_all("something", True)
    monkeypatch.setattr(hosts, "_hosts", None)
    assert hosts.in_all("something", True)
    monkeypatch.setattr(hosts, "in_all", lambda what, here: False)
    assert read_again(place, tmp_path, "base", tmp_path / "copy")[1] == str(tmp_path / "copy")


def test_adapters_that_are_named_as_a_base_lead_to_their_own(place, tmp_path):
    own = logits(place / "adapters")
    np.testing.assert_array_equal(logits(place / "adapters", base=place / "adapters"), own)


def test_adapters_are_read_in_float16_too(place):
    model, _ = moi_jax.load(place / "adapters", dtype="float16")
    assert model.embedding.table[...].dtype == np.float16
    np.testing.assert_allclose(model(TOKENS), logits(place / "adapters"), atol=0.05)


def test_the_export_of_adapters_verifies_as_equal(place, tmp_path):
    def verdict(against, **options):
        report = verify_checkpoint(place / "adapters", against, tensors_only=True, **options)
        return report["verdict"]

    export_checkpoint(place / "adapters", tmp_path / "wide", dtype="float32")
    assert verdict(place / "merged") == verdict(tmp_path / "wide") == "equal"
    assert verdict(place / "merged", base=place / "Tiny") == "equal"
    assert verdict(place / "Tiny") == "different"
