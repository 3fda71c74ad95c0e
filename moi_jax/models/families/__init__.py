"""The model families that can be imported and exported, by `ModelConfig.family`."""

from moi_jax.models.families.family import Family
from moi_jax.models.families.llama import LLAMA
from moi_jax.models.families.qwen2 import QWEN2
from moi_jax.models.families.qwen3 import QWEN3
from moi_jax.models.families.qwen_v1 import QWEN_V1

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN_V1, QWEN2, QWEN3, LLAMA)}
