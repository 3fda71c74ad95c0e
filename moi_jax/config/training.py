"""The sections `loss`, `optimizer`, `mesh` and `train`: how the model is trained."""

from typing import Any, Literal

from pydantic import Field, model_validator

from moi_jax.config.section import Count, FloatType, Positive, Section


class Loss(Section):
    normalization: Literal["token", "instruction", "domain"] = "token"
    targets: Literal["assistant", "qwen_official"] = "assistant"


class Optimizer(Section):
    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(1.0e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.01, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1.0e-8, gt=0)
    clip_norm: float | None = Field(1.0, gt=0)  # null: no clipping
    moment_dtype: FloatType = "float32"  # of the first moment


class Mesh(Section):
    """Devices along each axis; one of them may be -1, "all the rest"."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    @model_validator(mode="after")
    def check(self) -> "Mesh":
        sizes = (self.data, self.fsdp, self.tensor, self.context)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError("each axis is a positive number of devices, and at most one is -1")
        return self


class SamplePrompt(Section):
    """A user message answered during training, under its domain's and the default prompt."""

    domain: str
    prompt: str


class Train(Section):
    """Length (exactly one of steps, epochs, loss_tokens), batch, seed, sample answers."""

    steps: Positive | None = None
    epochs: Positive | None = None  # 3 when no length is set
    loss_tokens: Positive | None = None
    global_batch_rows: Positive = 64
    microbatch_rows: Positive | None = None  # null: global_batch_rows, no accumulation
    seed: Count = 0
    deterministic: bool = False  # asks the GPU compiler for run-to-run identical results
    sample_prompts: tuple[SamplePrompt, ...] = ()
    sample_every: Count = 0  # 0: before and after training only
    sample_max_new_tokens: Positive = 64
    early_stopping_patience: Positive | None = None
    profile_steps: tuple[int, int] | None = None

    @model_validator(mode="before")
    @classmethod
    def fill_length(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        lengths = ("steps", "epochs", "loss_tokens")
        named = [key for key in lengths if values.get(key) is not None]
        if len(named) > 1:
            raise ValueError(
                f"{' and '.join(named)} are both set; the length of a run is exactly one of "
                f"steps, epochs, loss_tokens: set the others to null"
            )
        return values if named else {**values, "epochs": 3}

    @model_validator(mode="after")
    def check(self) -> "Train":
        if self.microbatch_rows and self.global_batch_rows % self.microbatch_rows:
            raise ValueError(
                f"global_batch_rows {self.global_batch_rows} is no multiple of microbatch_rows "
                f"{self.microbatch_rows}"
            )
        return self
