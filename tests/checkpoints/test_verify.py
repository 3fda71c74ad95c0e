"""`convert verify`: every tensor accounted for, and logits by another implementation."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moi_jax.checkpoints.hf import compare, verify
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.hf.verify import verify_checkpoint
from moi_jax.common.errors import UserError

from support.published import add_tokenizer, convert, same_bits


@pytest.fixture(scope="module")
def made(golden, tmp_path_factory):
    """Fixture B, its checkpoint `ckpt`, and the same model by Qwen2's names in `qwen2`."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(golden / "B", folder / "B")
    add_tokenizer(folder / "B")
    import_checkpoint(folder / "B", folder / "ckpt")
    export_checkpoint(folder / "ckpt", folder / "one")
    export_checkpoint(folder / "ckpt", folder / "qwen2", as_family="qwen2")
    return folder


def test_a_true_copy_is_equal_and_what_was_not_checked_is_said(made):
    done = convert("verify", made / "ckpt", "--against", made / "B", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["tensors"]["matched"] == 27
    assert [report["tensors"][k] for k in ("missing", "unexpected", "mismatched")] == [[], [], []]
    assert (report["verdict"], report["logits"]["max_abs"]) == ("equal", None)
    assert "Qwen v1" in report["not_checked"][0] or "torch" in report["not_checked"][0]


def test_the_checksums_of_the_checkpoint_are_verified_too(made, tmp_path):
    shutil.copytree(made / "ckpt", tmp_path / "ckpt")
    (tmp_path / "ckpt" / "README.md").write_text("Files for people may be edited.")
    report = verify_checkpoint(tmp_path / "ckpt", made / "one", tensors_only=True)
    listed = len((tmp_path / "ckpt" / "SHA256SUMS").read_text().splitlines())
    assert f"checksums: {listed} files are as they were written" in verify.describe(report)
    data = next((tmp_path / "ckpt" / "parameters" / "d").iterdir())
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"parameters/d/{data.name} has changed since"):
        verify_checkpoint(tmp_path / "ckpt", made / "one", tensors_only=True)


def damaged(made, tmp_path, edit):
    shutil.copytree(made / "one", tmp_path / "there")
    path = tmp_path / "there" / "model.safetensors"
    held = load_file(path)
    edit(held)
    save_file(held, path, metadata={"format": "pt"})
    return verify_checkpoint(made / "ckpt", tmp_path / "there")


def test_one_changed_value_is_found_and_measured(made, tmp_path):
    def edit(held):
        held["transformer.h.1.attn.c_attn.bias"][3] += 0.5

    report = damaged(made, tmp_path, edit)
    (found,) = report["tensors"]["mismatched"]
    assert (found["name"], found["what"]) == ("transformer.h.1.attn.c_attn.bias", "value")
    assert (found["count"], found["of"]) == (1, 288)
    assert found["max_abs"] == pytest.approx(0.5)
    assert (report["tensors"]["matched"], report["verdict"]) == (26, "different")


def test_missing_unexpected_and_misshapen_tensors_are_named(made, tmp_path):
    def edit(held):
        held["transformer.more"] = np.zeros(2, np.float32)
        del held["transformer.ln_f.weight"]
        held["lm_head.weight"] = held["lm_head.weight"][:100]

    report = damaged(made, tmp_path, edit)["tensors"]
    assert report["missing"] == ["transformer.more"]
    assert report["unexpected"] == ["transformer.ln_f.weight"]
    (found,) = report["mismatched"]
    assert found == {
        "name": "lm_head.weight", "what": "shape", "ours": [512, 96], "theirs": [100, 96]
    }  # fmt: skip
    assert report["matched"] == 25


def test_a_difference_of_the_configuration_counts(made, tmp_path):
    shutil.copytree(made / "one", tmp_path / "there")
    path = tmp_path / "there" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_norm_epsilon": 1e-5}))
    done = convert("verify", made / "ckpt", "--against", tmp_path / "there")
    assert done.returncode == 1
    assert "config: norm_eps is 1e-06 here, 1e-05 there" in done.stdout
    assert done.stdout.endswith("verdict: different\n")


def test_weights_stored_in_another_dtype_are_compared_after_rounding(made, tmp_path):
    import_checkpoint(made / "B", tmp_path / "ckpt", dtype="bfloat16")
    tensors = verify_checkpoint(tmp_path / "ckpt", made / "B")["tensors"]
    assert (tensors["matched"], tensors["cast"]) == (27, 27)
    assert tensors["dtypes"] == {"ours": "bfloat16", "theirs": "float32"}


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


def test_logits_agree_with_transformers_alone_and_packed(made, oracle):
    report = verify_checkpoint(made / "ckpt", made / "qwen2")
    logits = report["logits"]
    assert report["not_checked"] == []
    assert report["tensors"]["matched"] == 39
    assert logits["max_abs"] < 2e-5
    assert 0 <= logits["mean_kl"] < 1e-9
    assert (logits["prompt"]["tokens"], logits["packed"]["tokens"]) == (64, 64)
    assert len(logits["top5"]) == 5
    assert logits["top5_order_equal"]
    assert report["verdict"] == "equal"
    lines = verify.describe(report)
    assert "logits, packed (64 tokens): max abs difference" in lines


FAMILIES = {
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen2Tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "Llama": {"num_key_value_heads": 2, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "Phi3": {"num_key_value_heads": 2, "pad_token_id": None},
}  # fmt: skip
# Phi-3 is here for its fused tensors; one dtype is enough for them.
SAVED = [
    (f, d) for f in FAMILIES for d in ("float32", "bfloat16") if (f, d) != ("Phi3", "bfloat16")
]
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(("family", "dtype"), SAVED)
def test_what_transformers_saved_goes_in_and_out_and_is_verified(tmp_path, oracle, family, dtype):
    import torch
    import transformers

    name = family.removesuffix("Tied")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **FAMILIES[family])
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "there")
    add_tokenizer(tmp_path / "there")
    import_checkpoint(tmp_path / "there", tmp_path / "ckpt")
    report = verify_checkpoint(tmp_path / "ckpt", tmp_path / "there")
    assert report["verdict"] == "equal", report
    assert (report["tensors"]["cast"], report["not_checked"]) == (0, [])
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    assert same_bits(tmp_path / "there", tmp_path / "out")
    assert verify_checkpoint(tmp_path / "ckpt", tmp_path / "out")["verdict"] == "equal"


def test_logits_that_disagree_are_a_difference(made, oracle, monkeypatch):
    """Tensors that match prove no architecture: here packed segments see each other."""
    original = compare.batches

    def as_one_segment(ids):
        for tokens, segment_ids in original(ids):
            yield tokens, np.ones_like(segment_ids)

    ids = np.arange(60, dtype=np.int32)
    import moi_jax

    model, _ = moi_jax.load(made / "ckpt")
    ours = [np.asarray(model(t, segment_ids=s)) for t, s in as_one_segment(ids)]
    logits = compare.compare_logits(ours, ids, made / "qwen2", np.dtype(np.float32))
    assert logits["prompt"]["max_abs"] < 2e-5
    assert logits["packed"]["max_abs"] > 0.01
    assert logits["mean_kl"] > verify.KL_BAR
    tensors = {"missing": [], "unexpected": [], "mismatched": []}
    assert verify.verdict({"config": {}, "tensors": tensors, "logits": logits}) == "different"


def test_tensors_only_says_so(made):
    report = verify_checkpoint(made / "ckpt", made / "qwen2", tensors_only=True)
    assert report["not_checked"] == ["logits: --tensors-only was given"]
    assert report["verdict"] == "equal"


def test_divergence_is_that_of_the_definition():
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(compare._divergence(p + 3, q - 1), [expected])


def test_the_packed_batch_holds_segments_of_many_lengths():
    (prompt, of_one), (rows, segments) = compare.batches(np.arange(500, dtype=np.int32))
    assert prompt.shape == of_one.shape == (1, 500)
    assert rows.shape == segments.shape == (2, 250)
    lengths = [np.unique(row, return_counts=True)[1].tolist() for row in segments]
    assert lengths == [[94, 156], [42, 146, 62]]


@pytest.mark.parametrize(
    ("against", "message"), [("nowhere", "config.json does not exist"), ("B", "is no checkpoint")]
)
def test_what_cannot_be_compared_is_one_line(made, tmp_path, against, message):
    checkpoint = tmp_path if against == "B" else made / "ckpt"
    done = convert("verify", checkpoint, "--against", made / against)
    assert done.returncode == 2
    assert message in done.stderr
