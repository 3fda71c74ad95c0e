"""Llama 2, 3, 3.1 and 3.2, and SmolLM2. Qwen1.5 and later use this layout too."""

from moi_jax.models.families.family import Family, HFTensor

KEYS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "mlp_width": ("intermediate_size",),
    "seq_length": ("max_position_embeddings",),
    "tied_head": ("tie_word_embeddings",),
    "rope_base": ("rope_theta",),
    "norm_eps": ("rms_norm_eps",),
    "initializer_range": ("initializer_range",),
}
# One key for the biases of all four attention projections.
BIAS_KEYS: dict[str, tuple[str, ...]] = {
    "qkv_bias": ("attention_bias",),
    "out_bias": ("attention_bias",),
}
FIXED = {"dynamic_ntk": False, "logn_attention": False, "default_system_prompt": ""}
DEFAULTS = {
    "attention_bias": False,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SUPPORTED = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "is_causal": True,
    "mlp_bias": False,
    "num_experts": 0,
    "num_local_experts": 0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
}
WRITTEN = {"attention_dropout": 0.0, "hidden_act": "silu", "use_cache": True}


def _layer(name: str, path: str, inputs: int = 0) -> HFTensor:
    """Returns the `HFTensor` of a tensor that every layer has."""
    return HFTensor(f"model.layers.{{}}.{name}", (f"layers.{path}",), inputs)


TENSORS = (
    HFTensor("model.embed_tokens.weight", ("embedding.table",)),
    _layer("input_layernorm.weight", "attention_norm.scale"),
    _layer("self_attn.q_proj.weight", "attention.query.kernel", inputs=1),
    _layer("self_attn.q_proj.bias", "attention.query.bias"),
    _layer("self_attn.k_proj.weight", "attention.key.kernel", inputs=1),
    _layer("self_attn.k_proj.bias", "attention.key.bias"),
    _layer("self_attn.v_proj.weight", "attention.value.kernel", inputs=1),
    _layer("self_attn.v_proj.bias", "attention.value.bias"),
    _layer("self_attn.o_proj.weight", "attention.out.kernel", inputs=2),
    _layer("self_attn.o_proj.bias", "attention.out.bias"),
    _layer("post_attention_layernorm.weight", "mlp_norm.scale"),
    _layer("mlp.gate_proj.weight", "mlp.gate.kernel", inputs=1),
    _layer("mlp.up_proj.weight", "mlp.up.kernel", inputs=1),
    _layer("mlp.down_proj.weight", "mlp.down.kernel", inputs=1),
    HFTensor("model.norm.weight", ("final_norm.scale",)),
    HFTensor("lm_head.weight", ("head.kernel",), inputs=1),
)

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=KEYS | BIAS_KEYS,
    fixed=FIXED | {"qk_norm": False},
    defaults=DEFAULTS,
    # LlamaForCausalLM has no windows: a file that names one is of another model.
    supported=SUPPORTED | {"sliding_window": None},
    written=WRITTEN | {"model_type": "llama", "mlp_bias": False, "rope_scaling": None},
    tensors=TENSORS,
    redundant=("model.layers.{}.self_attn.rotary_emb.inv_freq",),
)
