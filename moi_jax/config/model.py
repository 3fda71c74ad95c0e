"""The sections `model` and `tokenizer`: what is trained, and how text becomes ids."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moi_jax.config.section import AutoFloatType, FloatType, Location, Section

# Which tensors of a layer are kept for the backward pass, from the least to the most.
Remat = Literal[
    "full",
    "save_qkv_proj",
    "save_dot_except_mlp",
    "save_dot_with_context_except_mlp",
    "minimal",
    "minimal_with_context",
    "none",
]
RematTensor = Literal[
    "decoder_layer_input",
    "query_proj",
    "key_proj",
    "value_proj",
    "context",
    "out_proj",
    "mlp_gate",
    "mlp_up",
]
RematAction = Literal["save", "recompute", "offload"]
Block = Annotated[int, Field(gt=0, multiple_of=128, strict=True)]


class SplashBlocks(Section):
    """The largest blocks of the splash kernels, in tokens (see docs/attention.md)."""

    # Forward: rows of the scores, columns that are loaded, columns that are computed at once.
    q: Block = 1024
    kv: Block = 1024
    kv_compute: Block = 512
    # Backward, one kernel for all three gradients: the same.
    q_dkv: Block = 1024
    kv_dkv: Block = 1024
    kv_dkv_compute: Block = 512

    @model_validator(mode="after")
    def check(self) -> "SplashBlocks":
        for loaded, computed in (("kv", "kv_compute"), ("kv_dkv", "kv_dkv_compute")):
            if getattr(self, loaded) % getattr(self, computed):
                raise ValueError(
                    f"{loaded} {getattr(self, loaded)} is not a multiple of {computed} "
                    f"{getattr(self, computed)}"
                )
        return self


class Model(Section):
    """What is trained. With `init_from` the architecture is that of the checkpoint."""

    preset: str | None = None  # null: init_from's architecture; qwen-7b without init_from
    # A checkpoint of ours, published weights, or an id of the hub; null: random weights.
    init_from: Location | None = None
    allow_longer: bool = False  # rows longer than the model's seq_length (see docs/method.md)
    remat: Remat = "full"
    # Exceptions from it, by tensor: save, recompute or offload (to the memory of the host).
    remat_tensors: dict[RematTensor, RematAction] = Field({})
    param_dtype: FloatType = "float32"
    compute_dtype: AutoFloatType = "auto"  # auto: bfloat16, float32 on CPU
    attention: Literal["auto", "xla", "blockwise", "splash", "mosaic_gpu"] = "auto"
    splash_blocks: SplashBlocks = SplashBlocks()

    @model_validator(mode="after")
    def check(self) -> "Model":
        if self.remat == "none" and self.remat_tensors:
            raise ValueError("remat_tensors has no effect with remat: none; use another remat")
        if self.remat_tensors.get("decoder_layer_input", "offload") != "offload":
            raise ValueError(
                "remat_tensors.decoder_layer_input is kept in any case; offload is its only choice"
            )
        return self


class TokenizerConfig(Section):
    """Where the tokenizer is, and the chat template that goes with it."""

    path: Path | None = None  # a directory or an id of the hub; null: the tokenizer of init_from
    # from_checkpoint, chatml, llama3, or the path of a .jinja file (see text/template_choice.py).
    chat_template: str = "from_checkpoint"
