"""Llama 2, 3, 3.1 and 3.2, SmolLM2: the layout the younger Qwens follow too."""

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
# Of the attention's four projections.
BIAS_KEYS: dict[str, tuple[str, ...]] = {
    "qkv_bias": ("attention_bias",),
    "out_bias": ("attention_bias",),
}
FIXED = {"dynamic_ntk": False, "logn_attention": False, "default_system_prompt": ""}
DEFAULTS = {
    "attention_bias": False,
    "initializer_range": 0.02,
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
TENSORS = (
    HFTensor("model.embed_tokens.weight", ("embedding",)),
    HFTensor("model.layers.{}.input_layernorm.weight", ("layers.attention_norm",)),
    HFTensor("model.layers.{}.self_attn.q_proj.weight", ("layers.query",), inputs=1),
    HFTensor("model.layers.{}.self_attn.q_proj.bias", ("layers.query_bias",)),
    HFTensor("model.layers.{}.self_attn.k_proj.weight", ("layers.key",), inputs=1),
    HFTensor("model.layers.{}.self_attn.k_proj.bias", ("layers.key_bias",)),
    HFTensor("model.layers.{}.self_attn.v_proj.weight", ("layers.value",), inputs=1),
    HFTensor("model.layers.{}.self_attn.v_proj.bias", ("layers.value_bias",)),
    HFTensor("model.layers.{}.self_attn.o_proj.weight", ("layers.out",), inputs=2),
    HFTensor("model.layers.{}.self_attn.o_proj.bias", ("layers.out_bias",)),
    HFTensor("model.layers.{}.post_attention_layernorm.weight", ("layers.mlp_norm",)),
    HFTensor("model.layers.{}.mlp.gate_proj.weight", ("layers.gate",), inputs=1),
    HFTensor("model.layers.{}.mlp.up_proj.weight", ("layers.up",), inputs=1),
    HFTensor("model.layers.{}.mlp.down_proj.weight", ("layers.down",), inputs=1),
    HFTensor("model.norm.weight", ("final_norm",)),
    HFTensor("lm_head.weight", ("head",), inputs=1),
)

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=KEYS | BIAS_KEYS,
    fixed=FIXED | {"qk_norm": False},
    defaults=DEFAULTS,
    # The class has no windows: a file that names one is another model in disguise.
    supported=SUPPORTED | {"sliding_window": None},
    written=WRITTEN | {"model_type": "llama", "mlp_bias": False, "rope_scaling": None},
    tensors=TENSORS,
    redundant=("model.layers.{}.self_attn.rotary_emb.inv_freq",),
)
