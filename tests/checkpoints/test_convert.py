"""`convert import` on the golden checkpoints, and what it says of damaged ones."""

import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import moi_jax
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.hf.reader import read_published
from moi_jax.checkpoints.hf.weights import published_shapes
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.parameter_files import expected, save_parameters
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.common.errors import UserError
from moi_jax.models.config import ModelConfig, to_hf_config

from support.processes import start
from support.published import (
    add_tokenizer,
    convert,
    edit_config,
    edit_index,
    edit_shard,
    micro_published,
    remove,
    write,
)
from support.runs import ENVIRONMENT, ROOT, forget_checksums


@pytest.fixture
def published(golden, tmp_path):
    """Fixture B with a tokenizer of 259 ids, as a published folder."""
    shutil.copytree(golden / "B", tmp_path / "B")
    add_tokenizer(tmp_path / "B")
    return tmp_path / "B"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_imported_checkpoint_gives_the_published_logits(golden, published, tmp_path, dtype):
    done = convert("import", published, "--out", tmp_path / "ckpt", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    shutil.move(tmp_path / "ckpt", tmp_path / "moved")  # it stands alone
    model, tokenizer = moi_jax.load(tmp_path / "moved", dtype=dtype)
    arrays = np.load(golden / "B" / "logits.npz")
    logits = model(arrays["x100"].astype(np.int32))
    assert logits.dtype == jnp.float32
    tolerance = 2e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(logits, arrays["eval_100"], atol=tolerance, rtol=0)
    assert tokenizer.vocab_size == 259


def test_a_checkpoint_loads_onto_a_mesh(published, tmp_path):
    from moi_jax import config as config_lib
    from moi_jax.parallel.mesh import make_mesh

    import_checkpoint(published, tmp_path / "ckpt")
    mesh = make_mesh(config_lib.Mesh(fsdp=4, tensor=2), jax.devices())
    sharded, _ = moi_jax.load(tmp_path / "ckpt", mesh=mesh)
    whole, _ = moi_jax.load(tmp_path / "ckpt")
    assert not sharded.layers.attention.query.kernel[...].sharding.is_fully_replicated
    tokens = np.arange(40, dtype=np.int32)[None]
    np.testing.assert_allclose(
        jax.device_get(sharded(tokens)), jax.device_get(whole(tokens)), atol=2e-5
    )


def test_one_layer_of_a_stored_parameter_is_read_by_itself(published, tmp_path):
    import_checkpoint(published, tmp_path / "ckpt")
    config, expected = read_published(published, None)
    stored = stored_parameters(tmp_path / "ckpt", config)
    np.testing.assert_array_equal(
        stored.get("layers.mlp.gate.kernel", 1), expected["layers"]["mlp"]["gate"]["kernel"][1]
    )
    np.testing.assert_array_equal(stored.get("head.kernel"), expected["head"]["kernel"])
    assert stored.dtype == np.float32


def test_large_parameters_are_stored_in_chunks_of_single_layers(published, tmp_path, monkeypatch):
    from moi_jax.checkpoints import parameter_files

    monkeypatch.setattr(parameter_files, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(parameter_files, "BLOCK_BYTES", 30_000)  # no multiple of a chunk
    import_checkpoint(published, tmp_path / "ckpt")
    config, expected = read_published(published, None)
    stored = stored_parameters(tmp_path / "ckpt", config)
    layers, rows, width = stored.arrays["layers.mlp.gate.kernel"].chunk_layout.read_chunk.shape
    assert layers == 1
    assert rows * width * 4 <= 10_000
    rows, width = stored.arrays["embedding.table"].chunk_layout.read_chunk.shape
    assert 1_000 < rows * width * 4 <= 10_000
    model, _ = moi_jax.load(tmp_path / "ckpt")
    gates = expected["layers"]["mlp"]["gate"]["kernel"]
    np.testing.assert_array_equal(model.layers.mlp.gate.kernel[...], gates)
    np.testing.assert_array_equal(model.embedding.table[...], expected["embedding"]["table"])


def test_saving_holds_one_parameter_at_a_time(tmp_path):
    """The one before is let go of when the next is asked for."""
    import weakref

    from moi_jax.models.parameters import parameter_specs
    from moi_jax.models.presets import preset

    class Counted(np.ndarray):
        pass

    config = preset("tiny")
    alive: list[weakref.ref] = []

    def stream():
        for path, parameter in parameter_specs(config).items():
            assert not any(reference() is not None for reference in alive), path
            value = np.zeros(parameter.shape, np.float32).view(Counted)
            alive.append(weakref.ref(value))
            yield path, value
            del value

    whole = expected(config, np.dtype(np.float32))
    save_parameters(tmp_path / "parameters", whole, stream())
    assert len(alive) == len(parameter_specs(config))


def test_licence_notice_and_terms_come_along(published, tmp_path):
    (published / "LICENSE").write_text("do what is right")
    (published / "NOTICE.txt").write_text("made by us")
    (published / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# B\n")
    import_checkpoint(published, tmp_path / "ckpt")
    provenance = read_items(tmp_path / "ckpt").provenance
    assert provenance["files"] == {"LICENSE": "do what is right", "NOTICE.txt": "made by us"}
    assert (provenance["base"], provenance["license"]) == ("B", "apache-2.0")
    assert provenance["generation_config"]["chat_format"] == "raw"
    assert (tmp_path / "ckpt" / "LICENSE").read_text() == "do what is right"
    card = (tmp_path / "ckpt" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert "LICENSE, NOTICE.txt" in card
    assert "You are a helpful assistant." in card


def test_values_that_are_no_numbers_are_counted_by_tensor(published, tmp_path):
    def spoil(held):
        for name, values in damages.items():
            if name in held:
                held[name].reshape(-1)[: len(values)] = values

    damages = {
        "transformer.h.1.mlp.w1.weight": [np.nan, np.inf, -np.inf],
        "transformer.h.1.ln_1.weight": [np.nan],
    }
    for number in (1, 2, 3):
        edit_shard(number, spoil)(published)
    done = convert("import", published, "--out", tmp_path / "ckpt")
    assert done.returncode == 0, done.stderr
    assert "mlp.w1.weight has 3 values that are NaN or infinite" in done.stderr
    assert "h.1.ln_1.weight has 1 values that are NaN or infinite" in done.stderr


def cut_short(folder):
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def repeat_a_tensor(held):
    held["transformer.wte.weight"] = np.zeros(2, np.float32)


def only_pickles(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def transpose_a_matrix(held):
    held["lm_head.weight"] = np.ascontiguousarray(held["lm_head.weight"].T)


def without_model_type(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["model_type"]
    path.write_text(json.dumps(values))


def many_ids(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far"] = 512
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


SHARD = "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
DAMAGES = {
    "a shard cut short": (cut_short, "model-00002-of-00003.safetensors is damaged or cut short"),
    "a shard missing": (remove(SHARD), f"{SHARD} is named by {INDEX} but missing; copy it here"),
    "an empty shard": (write(SHARD, b""), f"{SHARD} is damaged or cut short"),
    "a shard of something else": (write(SHARD, b"<html>" * 99), f"{SHARD} is damaged or cut short"),
    "index no JSON": (write(INDEX, b"{"), f"{INDEX} is damaged"),
    "index without a map": (write(INDEX, b"{}"), f"{INDEX} is damaged (KeyError('weight_map'))"),
    "index of an absent tensor": (
        edit_index(lambda names: names.update({"transformer.extra": SHARD})),
        f"{INDEX} says {SHARD} holds transformer.extra, which is not there",
    ),
    "index of a tensor elsewhere": (
        edit_index(lambda names: names.update({"transformer.wte.weight": SHARD})),
        f"{INDEX} says {SHARD} holds transformer.wte.weight, which is not there",
    ),
    "index out of its folder": (
        edit_index(lambda names: names.update({"lm_head.weight": "../x.safetensors"})),
        "names '../x.safetensors', which is outside its directory",
    ),
    "a tensor too many": (
        edit_shard(3, lambda held: held.update({"transformer.more": np.zeros(2, np.float32)})),
        "has unexpected 1 tensors by its config: transformer.more",
    ),
    "a tensor twice": (
        edit_shard(3, repeat_a_tensor),
        "transformer.wte.weight is in model-00001-of-00003.safetensors and in",
    ),
    "a tensor missing": (
        lambda folder: [
            edit_shard(3, lambda held: held.pop("lm_head.weight"))(folder),
            edit_index(lambda names: names.pop("lm_head.weight"))(folder),
        ],
        "lacks 1 tensors by its config: lm_head.weight",
    ),
    "a matrix transposed": (edit_shard(3, transpose_a_matrix), "lm_head.weight has shape (96,"),
    "quantised storage": (
        edit_shard(3, lambda held: held.update({"lm_head.weight": np.zeros((512, 96), np.int8)})),
        "lm_head.weight is stored as I8; quantised weights are not supported",
    ),
    "quantised by its config": (
        edit_config(quantization_config={"bits": 4}),
        "quantised weights are not supported",
    ),
    "no config": (remove("config.json"), "config.json does not exist"),
    "config no JSON": (write("config.json", b"{"), "config.json is not valid JSON"),
    "config without model_type": (without_model_type, "config.json has no model_type"),
    "another architecture": (edit_config(model_type="mamba"), "model_type 'mamba' is not built"),
    "more layers in config": (edit_config(num_hidden_layers=4), "lacks 8 tensors by its config"),
    "fewer layers in config": (edit_config(num_hidden_layers=2), "has unexpected 8 tensors"),
    "half a layer": (edit_config(num_hidden_layers=2.5), "2.5"),
    "another width": (edit_config(intermediate_size=512), "config.json says"),
    "pickles": (only_pickles, "pickled weights can run code and are not read"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer"),
    "tokenizer no JSON": (write("tokenizer.json", b"{"), "tokenizer.json is not a tokenizer"),
    "tokenizer of another": (many_ids, "the tokenizer has 513 ids, the embedding in"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(published, tmp_path, what):
    damage, message = DAMAGES[what]
    damage(published)
    with pytest.raises(UserError) as error:
        import_checkpoint(published, tmp_path / "ckpt")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["B"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere is no directory and no .gguf file"),
        ("weights.pt", "pickled weights can run code and are not read"),
    ],
)
def test_a_source_that_is_no_checkpoint_is_one_line(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / name, tmp_path / "ckpt")


def test_an_existing_target_is_not_overwritten(published, tmp_path):
    (tmp_path / "ckpt").mkdir()
    done = convert("import", published, "--out", tmp_path / "ckpt")
    assert (done.returncode, "nothing is overwritten" in done.stderr) == (2, True)


def test_published_dtype_is_kept_by_default(published, tmp_path):
    parameters = read_published(published, None)[1]
    assert parameters["head"]["kernel"].dtype == np.float32
    assert parameters["layers"]["mlp"]["gate"]["kernel"].shape == (3, 96, 128)


def test_a_target_that_cannot_be_written_is_one_line(published, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*file/out"):
        import_checkpoint(published, tmp_path / "file" / "out")


def test_a_file_that_fails_while_it_is_read_leaves_nothing(published, tmp_path, monkeypatch):
    """As when a disk goes away: the headers were fine."""
    from moi_jax.checkpoints.hf.safetensors_reader import TensorFiles

    def read(self, name):
        if "h.2" in name:
            raise UserError("the disk is gone")
        return original(self, name)

    original = TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", read)
    with pytest.raises(UserError, match="the disk is gone"):
        import_checkpoint(published, tmp_path / "ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["B"]


SLOW = """
import time
from moi_jax.checkpoints.hf.safetensors_reader import TensorFiles
read = TensorFiles.read
def slow(self, name):
    print(name, flush=True)
    time.sleep(0.5)
    return read(self, name)
TensorFiles.read = slow
import sys, runpy
sys.argv = ["convert", "import", sys.argv[1], "--out", sys.argv[2]]
runpy.run_module("moi_jax.convert", run_name="__main__")
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_import_leaves_nothing(published, tmp_path, sent):
    process = start(
        [sys.executable, "-c", SLOW, published, tmp_path / "ckpt"],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(3):
        assert process.stdout.readline().strip()  # it is in the middle of the tensors
    assert len(list(tmp_path.iterdir())) == 2  # the source, and what is half written
    process.send_signal(sent)
    assert process.wait(timeout=60) == 128 + sent
    assert [p.name for p in tmp_path.iterdir()] == ["B"]


def test_a_tied_head_may_come_as_a_copy_but_not_as_another(tmp_path):
    import dataclasses

    from moi_jax.checkpoints.hf.reader import open_published
    from moi_jax.models.config import in_family
    from moi_jax.models.presets import preset

    folder = micro_published(tmp_path / "tied", np.float32)
    config = in_family(preset("tiny"), "qwen2")
    tied = dataclasses.replace(config, tied_head=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(tied)))
    rng = np.random.default_rng(0)
    held = {n: rng.standard_normal(s, np.float32) for n, s in published_shapes(tied).items()}
    held["lm_head.weight"] = held["model.embed_tokens.weight"].copy()
    save_file(held, folder / "model.safetensors")
    assert open_published(folder).config.tied_head
    held["lm_head.weight"][0, 0] += 1
    save_file(held, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        open_published(folder)


def test_old_checkpoints_without_provenance_are_read(published, tmp_path):
    import_checkpoint(published, tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt" / "provenance")
    forget_checksums(tmp_path / "ckpt")
    items = read_items(tmp_path / "ckpt")
    assert items.provenance == {}
    assert isinstance(items.model, ModelConfig)


def test_a_checkpoint_of_another_format_is_refused_in_one_line(published, tmp_path):
    """Checkpoints of the first format have other names of parameters, and do not name a format."""
    import_checkpoint(published, tmp_path / "ckpt")
    item = tmp_path / "ckpt" / "model" / "metadata"
    model = json.loads(item.read_text())
    assert model.pop("format") == 3
    item.write_text(json.dumps(model))
    (tmp_path / "ckpt" / "SHA256SUMS").unlink()  # the first format had none
    with pytest.raises(UserError) as error:
        moi_jax.load(tmp_path / "ckpt")
    assert "is of format 1, this version reads formats 2 to 5; import" in str(error.value)
    assert "\n" not in str(error.value)
