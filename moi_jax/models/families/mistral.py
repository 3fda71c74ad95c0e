"""Mistral 7B v0.3 and Nemo: Llama's layout, with windows in the older models, which are refused."""

from moi_jax.models.families import llama
from moi_jax.models.families.family import Family

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=llama.KEYS,
    fixed=llama.FIXED | {"qkv_bias": False, "out_bias": False, "qk_norm": False},
    defaults=llama.DEFAULTS,
    supported=llama.SUPPORTED | {"attention_bias": False},
    written=llama.WRITTEN | {"model_type": "mistral", "sliding_window": None},
    tensors=llama.TENSORS,
    switches_windows=False,
    default_window=4096,
)
