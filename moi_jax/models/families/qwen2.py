"""Qwen1.5, Qwen2 and Qwen2.5: Llama's layout, with biases on queries, keys and values."""

from moi_jax.models.families import llama
from moi_jax.models.families.family import Family

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=llama.KEYS,
    fixed=llama.FIXED
    | {
        "qkv_bias": True,
        "out_bias": False,
        "qk_norm": False,
        # Qwen2's. Qwen1.5 and Qwen2.5 have others, which only their chat templates contain.
        "default_system_prompt": "You are a helpful assistant.",
    },
    defaults=llama.DEFAULTS | {"max_window_layers": 28},
    supported=llama.SUPPORTED,
    written=llama.WRITTEN | {"model_type": "qwen2", "use_sliding_window": False},
    tensors=llama.TENSORS,
)
