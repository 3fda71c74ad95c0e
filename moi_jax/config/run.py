"""The sections `checkpoint`, `logging` and `cluster`: how a run is kept, shown, held together."""

from pathlib import Path
from typing import Literal

from moi_jax.config.section import Count, Location, Positive, Section


class Checkpoint(Section):
    """When checkpoints are saved, and which of them are kept."""

    every: Positive = 500  # steps
    keep_last: Positive = 2
    keep_best: Count = 1
    best_metric: str = "eval/mean/loss"  # lower is better
    grace_seconds: Positive = 120
    retry_seconds: Count = 60  # for how long a write is tried again when the store fails
    save_timeout: Positive = 1200  # seconds for a save in the background
    save_base: bool = False  # with lora: also save the frozen parameters
    verify: bool = True  # compares the arrays with their checksums before they are read


class Logging(Section):
    """The run directory, and what is logged there."""

    run_dir: Location = Path("runs/moi")
    every: Positive = 10
    trackers: tuple[Literal["tensorboard", "prometheus", "wandb", "trackio"], ...] = (
        "tensorboard",
    )


class Cluster(Section):
    """How long the processes of a run on many hosts wait for each other."""

    join_seconds: Positive = 300  # at the start, until all of them are there
    lost_seconds: Positive = 60  # without a sign of life of one, until the others end
    stuck_seconds: Count = 1800  # for a step, a batch of an evaluation, or a save; 0: no limit
