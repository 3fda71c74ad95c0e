"""Qwen (2023): q, k and v in one tensor, its own names and keys, NTK and log-n attention."""

from moi_jax.models.families.family import Family, HFTensor

QWEN_V1 = Family(
    name="qwen_v1",
    model_type="qwen",
    architecture="QWenLMHeadModel",
    # The second keys are from the release of August 2023.
    keys={
        "vocab_size": ("vocab_size", "padded_vocab_size"),
        "num_layers": ("num_hidden_layers", "n_layer"),
        "hidden_size": ("hidden_size", "n_embd"),
        "num_heads": ("num_attention_heads", "n_head"),
        "head_dim": ("kv_channels",),
        "mlp_width": ("intermediate_size", "ffn_hidden_size"),
        "seq_length": ("seq_length",),
        "rope_base": ("rotary_emb_base",),
        "norm_eps": ("layer_norm_epsilon",),
        "dynamic_ntk": ("use_dynamic_ntk",),
        "logn_attention": ("use_logn_attn",),
        "initializer_range": ("initializer_range",),
    },
    fixed={
        "qkv_bias": True,
        "out_bias": False,
        "qk_norm": False,
        "tied_head": False,
        "default_system_prompt": "You are a helpful assistant.",
    },
    defaults={"kv_channels": 128},
    supported={
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "no_bias": True,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "use_cache_quantization": False,
    },
    written={
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "bf16": False,  # if all three are false, the model chooses by the device
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "max_position_embeddings": 32768,  # the model does not read it
        "model_type": "qwen",
        "no_bias": True,
        "onnx_safe": None,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_flash_attn": "auto",
    },
    tensors=(
        HFTensor("transformer.wte.weight", ("embedding.table",)),
        HFTensor("transformer.h.{}.ln_1.weight", ("layers.attention_norm.scale",)),
        HFTensor(
            "transformer.h.{}.attn.c_attn.weight",
            (
                "layers.attention.query.kernel",
                "layers.attention.key.kernel",
                "layers.attention.value.kernel",
            ),
            inputs=1,
        ),
        HFTensor(
            "transformer.h.{}.attn.c_attn.bias",
            (
                "layers.attention.query.bias",
                "layers.attention.key.bias",
                "layers.attention.value.bias",
            ),
        ),
        HFTensor("transformer.h.{}.attn.c_proj.weight", ("layers.attention.out.kernel",), inputs=2),
        HFTensor("transformer.h.{}.ln_2.weight", ("layers.mlp_norm.scale",)),
        HFTensor("transformer.h.{}.mlp.w1.weight", ("layers.mlp.up.kernel",), inputs=1),
        HFTensor("transformer.h.{}.mlp.w2.weight", ("layers.mlp.gate.kernel",), inputs=1),
        HFTensor("transformer.h.{}.mlp.c_proj.weight", ("layers.mlp.down.kernel",), inputs=1),
        HFTensor("transformer.ln_f.weight", ("final_norm.scale",)),
        HFTensor("lm_head.weight", ("head.kernel",), inputs=1),
    ),
    scales_rope=False,
    derives_head_dim=False,
    mlp_matrices=2,
)
