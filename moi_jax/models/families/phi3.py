"""Phi-4: q, k and v in one tensor, gate and up in another; heads may be rotated in part.

Phi-4 (14B) is of this family, with Phi-3's names. The models with rope type "longrope" (Phi-4-mini,
Phi-3 with 128k tokens) are refused.
"""

from moi_jax.models.families import llama
from moi_jax.models.families.family import Family, HFTensor

FUSED = {
    "self_attn.qkv_proj.weight": ("attention.query", "attention.key", "attention.value"),
    "mlp.gate_up_proj.weight": ("mlp.gate", "mlp.up"),
}
# Llama's tensors that are parts of these.
PARTS = {f"layers.{module}.kernel" for modules in FUSED.values() for module in modules}

PHI3 = Family(
    name="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    keys=llama.KEYS | {"partial_rotary_factor": ("partial_rotary_factor",)},
    fixed=llama.FIXED | {"qkv_bias": False, "out_bias": False, "qk_norm": False},
    defaults=llama.DEFAULTS,
    supported={k: only for k, only in llama.SUPPORTED.items() if k != "partial_rotary_factor"}
    | {"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    written=llama.WRITTEN
    | {
        "model_type": "phi3",
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "sliding_window": None,
    },
    tensors=(
        *(tensor for tensor in llama.TENSORS if not PARTS & {*tensor.paths}),
        *(
            HFTensor(
                f"model.layers.{{}}.{name}",
                tuple(f"layers.{module}.kernel" for module in modules),
                inputs=1,
            )
            for name, modules in FUSED.items()
        ),
    ),
    rope_types=("default",),  # transformers' Phi3 knows no others, but for "longrope"
    switches_windows=False,
    # Read with rope type "longrope" alone, but some tools do not open a file without it.
    repeated={"original_max_position_embeddings": "max_position_embeddings"},
)
