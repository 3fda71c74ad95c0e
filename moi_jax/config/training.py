"""The sections `loss`, `optimizer`, `mesh` and `train`: how the model is trained."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from moi_jax.config.section import Count, FloatType, Location, Positive, Section, listed

# Of commands without a config of the run, too.
COMPILATION_CACHE = Path("~/.cache/moi_jax/xla")


class Loss(Section):
    """What the loss weighs and on which tokens, see docs/method.md."""

    normalization: Literal["token", "instruction", "domain"] = "token"
    targets: Literal["assistant", "qwen_official"] = "assistant"


# The settings that an optimizer does not read.
UNREAD: dict[str, tuple[str, ...]] = {
    "adamw": (),
    "adafactor": ("b1", "b2", "eps", "moment_dtype", "second_moment_dtype"),
    "lion": ("eps", "second_moment_dtype"),
    "muon": ("second_moment_dtype",),
}
# A bfloat16 has 8 bits: b2 times the moment is rounded back to it if 1 - b2 is less than 1/256.
LARGEST_BFLOAT16_B2 = 0.996


class Optimizer(Section):
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: float = Field(1.0e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.01, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1.0e-8, gt=0)
    clip_norm: float | None = Field(1.0, gt=0)  # null: no clipping
    moment_dtype: FloatType = "float32"  # of the first moment
    second_moment_dtype: FloatType = "float32"  # only adamw's
    gradient_dtype: FloatType = "float32"  # while microbatches are added up, and until the update
    # Of an exponential moving average of the trained parameters; 0: none is kept.
    ema_decay: float = Field(0.0, ge=0, lt=1)
    # Patterns of parameters that are not trained.
    frozen: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()

    @model_validator(mode="after")
    def check(self) -> "Optimizer":
        for key in UNREAD[self.name]:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect on {self.name}; remove it or use adamw")
        if self.second_moment_dtype == "bfloat16" and self.b2 > LARGEST_BFLOAT16_B2:
            raise ValueError(
                f"b2 {self.b2} is too large for a second moment in bfloat16, which would never "
                f"fall: set b2 to {LARGEST_BFLOAT16_B2} or less, or second_moment_dtype to float32"
            )
        return self


class Mesh(Section):
    """Devices along each axis; -1, at most once, takes all the remaining ones."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    @model_validator(mode="after")
    def check(self) -> "Mesh":
        sizes = (self.data, self.fsdp, self.tensor, self.context)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError("each axis must be a positive number of devices; one may be -1")
        return self


class SamplePrompt(Section):
    """A user message to answer during training, under its domain's and the default prompt."""

    domain: str
    prompt: str


class Train(Section):
    """The length (exactly one of steps, epochs, loss_tokens), batch, seed and sample answers."""

    steps: Positive | None = None
    epochs: Positive | None = None  # 3 when no length is set
    loss_tokens: Positive | None = None
    global_batch_rows: Positive = 64
    microbatch_rows: Positive | None = None  # null: global_batch_rows, no accumulation
    seed: Count = 0
    deterministic: bool = False  # asks the GPU compiler for run-to-run identical results
    # Where jax keeps compiled programs: xla/ in data.cache_dir by default; null: nowhere.
    compilation_cache: Location | None = COMPILATION_CACHE
    sample_prompts: tuple[SamplePrompt, ...] = ()
    sample_every: Count = 0  # 0: before and after training only
    sample_max_new_tokens: Positive = 64
    # The run ends after so many held-out evaluations in a row without a new best; null: never.
    early_stopping_patience: Positive | None = None
    profile_steps: tuple[Positive, Positive] | None = None  # first and last step, counted from 1
    # A loss over so many times the median of the latest steps is a spike; null: none is.
    max_loss_ratio: float | None = Field(None, gt=1)
    on_spike: Literal["skip", "stop"] = "skip"
    max_skipped_in_a_row: Positive = 3  # steps with a spike, or not finite, until the run stops

    @model_validator(mode="before")
    @classmethod
    def fill_length(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        lengths = ("steps", "epochs", "loss_tokens")
        named = [key for key in lengths if values.get(key) is not None]
        if len(named) > 1:
            raise ValueError(
                f"{' and '.join(named)} are set together; the length of a run is exactly one of "
                f"steps, epochs, loss_tokens: set the others to null"
            )
        return values if named else {**values, "epochs": 3}

    @model_validator(mode="after")
    def check(self) -> "Train":
        if self.microbatch_rows and self.global_batch_rows % self.microbatch_rows:
            raise ValueError(
                f"global_batch_rows {self.global_batch_rows} is not a multiple of microbatch_rows "
                f"{self.microbatch_rows}"
            )
        if self.on_spike != "skip" and self.max_loss_ratio is None:
            raise ValueError(
                f"on_spike: {self.on_spike} has no effect without max_loss_ratio; set both or none"
            )
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(
                f"profile_steps [{self.profile_steps[0]}, {self.profile_steps[1]}] ends before it "
                f"begins; give the first step, then the last one"
            )
        return self
