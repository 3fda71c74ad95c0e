"""The sections `model` and `tokenizer`: what is trained, and how text becomes ids."""

from pathlib import Path
from typing import Literal

from moi_jax.config.section import AutoFloatType, FloatType, Section


class Model(Section):
    """What is trained. With `init_from` the architecture is that of the checkpoint."""

    preset: str | None = None  # null: init_from's architecture; qwen-7b without init_from
    # A checkpoint of ours, published weights, or an id of the hub; null: random weights.
    init_from: Path | None = None
    allow_longer: bool = False  # rows longer than the model's seq_length (see docs/method.md)
    remat: Literal["full", "dots", "none"] = "full"
    param_dtype: FloatType = "float32"
    compute_dtype: AutoFloatType = "auto"  # auto: bfloat16, float32 on CPU
    attention: Literal["auto", "xla", "splash", "gpu"] = "auto"


class TokenizerConfig(Section):
    """Where the tokenizer is, and the chat template that goes with it."""

    path: Path | None = None  # a directory or an id of the hub; null: the tokenizer of init_from
    chat_template: Literal["from_checkpoint", "chatml", "llama3"] = "from_checkpoint"
