"""The sections `model` and `tokenizer`: what is trained, and how text becomes ids."""

from pathlib import Path
from typing import Literal

from moi_jax.config.section import FloatType, Section


class Model(Section):
    """What is trained. With `init_from` the architecture is that of the checkpoint."""

    preset: str | None = None  # null: init_from's architecture; qwen-7b without init_from
    init_from: Path | None = None  # a checkpoint of ours; null: random weights
    allow_longer: bool = False  # rows longer than the model's seq_length (see docs/method.md)
    remat: Literal["full", "dots", "none"] = "full"
    param_dtype: FloatType = "float32"
    compute_dtype: FloatType | Literal["auto"] = "auto"  # auto: bfloat16, float32 on CPU
    attention: Literal["auto", "xla", "splash", "gpu"] = "auto"


class TokenizerConfig(Section):
    """Where the tokenizer is, and the chat template that goes with it."""

    path: Path | None = None  # a directory; null: the tokenizer saved with init_from
    chat_template: Literal["from_checkpoint", "chatml", "llama3"] = "from_checkpoint"
