"""Qwen3, the dense sizes: RMSNorm over each query and key head, and an independent head_dim."""

from moi_jax.models.families import llama
from moi_jax.models.families.family import Family, HFTensor

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=llama.KEYS | llama.BIAS_KEYS,
    fixed=llama.FIXED | {"qk_norm": True},
    defaults=llama.DEFAULTS | {"head_dim": 128, "max_window_layers": 28},
    supported=llama.SUPPORTED,
    written=llama.WRITTEN
    | {"model_type": "qwen3", "rope_scaling": None, "use_sliding_window": False},
    tensors=(
        *llama.TENSORS,
        HFTensor("model.layers.{}.self_attn.q_norm.weight", ("layers.attention.query_norm.scale",)),
        HFTensor("model.layers.{}.self_attn.k_norm.weight", ("layers.attention.key_norm.scale",)),
    ),
    derives_head_dim=False,
)
