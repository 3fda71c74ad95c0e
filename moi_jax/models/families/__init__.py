"""The model families that can be imported and exported, by `ModelConfig.family`."""

from moi_jax.models.families.family import Family
from moi_jax.models.families.llama import LLAMA
from moi_jax.models.families.mistral import MISTRAL
from moi_jax.models.families.phi3 import PHI3
from moi_jax.models.families.qwen2 import QWEN2
from moi_jax.models.families.qwen3 import QWEN3
from moi_jax.models.families.qwen_v1 import QWEN_V1
from moi_jax.models.families.seed_oss import SEED_OSS
from moi_jax.models.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (QWEN_V1, QWEN2, QWEN3, LLAMA, MISTRAL, SEED_OSS, PHI3, SMOLLM3)
}
