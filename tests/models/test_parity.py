"""The decoder against a second oracle: transformers' Qwen2 in torch with the same weights.

Where dynamic NTK and log-n attention are inactive, as in training, Qwen v1 is Qwen2 with fused
projections. This file has its own list of names, independent of the tables that test_families.py
uses.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moi_jax.checkpoints.hf.reader import read_published
from moi_jax.models import rotary
from moi_jax.models.decoder import make_model
from moi_jax.models.loss import weighted_nll

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def qwen2_of(config, parameters):
    """Makes transformers' model with our parameters, [in, out] -> [out, in]."""
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    model.load_state_dict({k: torch.tensor(v) for k, v in qwen2_names(parameters).items()})
    return model.float()


def qwen2_names(tree):
    """Returns our tree (parameters or gradients) under Qwen2's tensor names."""
    tree = jax.tree.map(np.asarray, tree)
    layers = tree["layers"]
    attention, mlp = layers["attention"], layers["mlp"]
    d = tree["final_norm"]["scale"].shape[0]
    named = {
        "model.embed_tokens.weight": tree["embedding"]["table"],
        "model.norm.weight": tree["final_norm"]["scale"],
        "lm_head.weight": tree["head"]["kernel"].T,
    }
    for i in range(len(layers["mlp_norm"]["scale"])):
        prefix = f"model.layers.{i}."
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            name = f"{prefix}self_attn.{theirs}_proj"
            named[f"{name}.weight"] = attention[ours]["kernel"][i].reshape(d, -1).T
            named[f"{name}.bias"] = attention[ours]["bias"][i].reshape(-1)
        named[f"{prefix}self_attn.o_proj.weight"] = attention["out"]["kernel"][i].reshape(-1, d).T
        for name in ("gate", "up", "down"):
            named[f"{prefix}mlp.{name}_proj.weight"] = mlp[name]["kernel"][i].T
        named[f"{prefix}input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        named[f"{prefix}post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
    return named


@pytest.mark.parametrize(("fixture", "length"), [("B", 32), ("B", 100), ("A", 32)])
def test_loss_and_gradients_equal_transformers_qwen2(golden, fixture, length):
    config, parameters = read_published(golden / fixture, None)
    tokens = np.load(golden / fixture / "logits.npz")[f"x{length}"].astype(np.int32)

    def loss(parameters):
        model = make_model(config)(parameters)
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
        positions = rotary.segment_positions(segment_ids)
        hidden = model.hidden_states(tokens, positions, segment_ids, extend_context=False)
        targets = tokens[:, 1:]
        weights = jnp.full(targets.shape, 1 / targets.size)
        return weighted_nll(hidden[:, :-1], model.head_kernel(), targets, weights)[0]

    ours, gradients = jax.value_and_grad(loss)(parameters)
    reference = qwen2_of(config, parameters)
    theirs = reference(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    named = qwen2_names(gradients)
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(named[name], parameter.grad, atol=1e-6, rtol=0, err_msg=name)
