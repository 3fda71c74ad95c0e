"""`convert import` on the golden checkpoints, and what it says of damaged ones."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import moi_jax
from moi_jax.convert import import_checkpoint
from moi_jax.errors import UserError
from moi_jax.models.published import read_published

from run_helpers import ENVIRONMENT, ROOT


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "moi_jax.convert", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False,
    )  # fmt: skip


@pytest.fixture
def published(golden, tmp_path):
    """Fixture B with a tokenizer of 259 ids, as a published folder."""
    shutil.copytree(golden / "B", tmp_path / "B")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "B" / "tokenizer.json"))
    return tmp_path / "B"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_imported_checkpoint_gives_the_published_logits(golden, published, tmp_path, dtype):
    done = run("import", published, "--out", tmp_path / "ckpt", "--dtype", dtype)
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
    from moi_jax.training.sharding import make_mesh

    run("import", published, "--out", tmp_path / "ckpt")
    mesh = make_mesh(config_lib.Mesh(fsdp=4, tensor=2))
    sharded, _ = moi_jax.load(tmp_path / "ckpt", mesh=mesh)
    whole, _ = moi_jax.load(tmp_path / "ckpt")
    assert not sharded.layers.query[...].sharding.is_fully_replicated
    tokens = np.arange(40, dtype=np.int32)[None]
    np.testing.assert_allclose(
        jax.device_get(sharded(tokens)), jax.device_get(whole(tokens)), atol=2e-5
    )


def cut_short(folder):
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def without_shard(folder):
    (folder / "model-00003-of-00003.safetensors").unlink()


def edit_config(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


def only_pickles(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "model-00002-of-00003.safetensors is damaged or cut short"),
        (without_shard, "model-00003-of-00003.safetensors is named by"),
        (remove("config.json"), "config.json does not exist"),
        (edit_config(model_type="mamba"), "model_type 'mamba' is not built yet"),
        (edit_config(num_hidden_layers=4), "lacks 8 tensors by its config"),
        (edit_config(num_hidden_layers=2), "has unexpected 8 tensors"),
        (edit_config(num_hidden_layers=2.5), "num_hidden_layers is 2.5, not a whole number"),
        (edit_config(intermediate_size=512), "has shape (96, 128), config.json says (96, 256)"),
        (edit_config(quantization_config={"bits": 4}), "quantised weights are not supported"),
        (only_pickles, "pickled weights can run code and are not read"),
        (remove("tokenizer.json"), "tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(published, tmp_path, damage, message):
    damage(published)
    with pytest.raises(UserError) as error:
        import_checkpoint(published, tmp_path / "ckpt")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["B"]


def test_an_existing_target_is_not_overwritten(published, tmp_path):
    (tmp_path / "ckpt").mkdir()
    done = run("import", published, "--out", tmp_path / "ckpt")
    assert (done.returncode, "nothing is overwritten" in done.stderr) == (2, True)


def test_published_dtype_is_kept_by_default(published, tmp_path):
    parameters = read_published(published, None)[1]
    assert parameters["head"].dtype == np.float32
    assert parameters["layers"]["gate"].shape == (3, 96, 128)


def test_a_target_that_cannot_be_written_is_one_line(published, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*file/out"):
        import_checkpoint(published, tmp_path / "file" / "out")
