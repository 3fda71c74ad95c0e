"""The same logits as peft on transformers' models: exported adapters, and peft's own imported."""

import ml_dtypes
import numpy as np
import pytest

import moi_jax
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.hf.peft_exporter import export_adapter
from moi_jax.checkpoints.hf.peft_importer import import_adapter

from support.adapters import save_adapters
from support.published import edit_config, micro_published

REASON = "peft is not installed (pip install 'moi_jax[parity]')"
peft = pytest.importorskip("peft", reason=REASON)
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

PLAIN = {"dynamic_ntk": False, "logn_attention": False, "num_layers": 2, "num_kv_heads": 1}
KINDS = {
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "llama": {"family": "llama", "qkv_bias": False},
    "phi3": {"family": "phi3", "qkv_bias": False},  # q, k and v in one tensor, gate and up too
}
TOKENS = np.arange(24).reshape(2, 12) * 17 % 500


def their_logits(model):
    with torch.no_grad():
        return model.float().eval()(torch.from_numpy(TOKENS)).logits.numpy()


def whole(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def our_logits(path):
    model, _ = moi_jax.load(path)
    return np.asarray(model(TOKENS))


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    changes = {**PLAIN, **KINDS[request.param]}
    micro_published(folder / "Tiny", ml_dtypes.bfloat16, **changes)
    edit_config(pad_token_id=0)(folder / "Tiny")  # that of Phi-4 is beyond this vocabulary
    import_checkpoint(folder / "Tiny", folder / "base")
    return folder


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_both_exports_have_our_logits(place, tmp_path, scaling):
    adapters = save_adapters(place / "base", tmp_path / "adapters", scaling=scaling)
    ours = our_logits(adapters)
    export_checkpoint(adapters, tmp_path / "merged", dtype="float32")
    np.testing.assert_allclose(their_logits(whole(tmp_path / "merged")), ours, atol=2e-5)
    export_adapter(adapters, tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(whole(place / "Tiny"), tmp_path / "peft")
    np.testing.assert_allclose(their_logits(loaded), ours, atol=2e-5)
    assert np.abs(ours - their_logits(whole(place / "Tiny"))).max() > 0.01


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_made_by_peft_has_its_logits_here(place, tmp_path, rslora):
    fused = place.name.startswith("phi3")
    targets = ["qkv_proj", "down_proj"] if fused else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(whole(place / "Tiny"), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "theirs")
    import_adapter(tmp_path / "theirs", place / "base", tmp_path / "ours")
    np.testing.assert_allclose(our_logits(tmp_path / "ours"), their_logits(model), atol=2e-5)
