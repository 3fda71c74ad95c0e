"""SmolLM3: Llama's layout; every fourth layer does not rotate its queries and keys."""

from moi_jax.models.families import llama
from moi_jax.models.families.family import Family

SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys=llama.KEYS | llama.BIAS_KEYS,
    fixed=llama.FIXED | {"qk_norm": False},
    defaults=llama.DEFAULTS
    | {"no_rope_layer_interval": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
    # With windows, they would be those of the layers that do not rotate.
    supported=llama.SUPPORTED | {"use_sliding_window": False},
    written=llama.WRITTEN
    | {
        "model_type": "smollm3",
        "mlp_bias": False,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    tensors=llama.TENSORS,
    skips_rope=True,
)
