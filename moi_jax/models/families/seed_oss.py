"""Seed-OSS: Llama's layout, with biases on queries, keys and values, and a head_dim of its own."""

from moi_jax.models.families import llama
from moi_jax.models.families.family import Family

# The published files name a dropout of 0.1. It acts in training alone, and we train without it.
DROPOUT = {"attention_dropout": 0.1, "residual_dropout": 0.1}

SEED_OSS = Family(
    name="seed_oss",
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    keys=llama.KEYS | {"qkv_bias": ("attention_bias",), "out_bias": ("attention_out_bias",)},
    fixed=llama.FIXED | {"qk_norm": False},
    defaults=llama.DEFAULTS
    | {"attention_bias": True, "attention_out_bias": False, "head_dim": 128},
    supported={key: only for key, only in llama.SUPPORTED.items() if key not in DROPOUT}
    | {"sliding_window": None},
    written=llama.WRITTEN
    | DROPOUT
    | {"model_type": "seed_oss", "mlp_bias": False, "rope_scaling": None},
    tensors=llama.TENSORS,
    derives_head_dim=False,
)
