"""The sections `checkpoint`, `logging` and `cluster`: how a run is kept, shown, held together."""

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from moi_jax.config.section import Count, LocalPath, Location, Positive, Section


class Checkpoint(Section):
    """When checkpoints are saved, and which of them are kept."""

    every: Positive = 500  # steps
    # Steps between copies of the state on the hosts' own disks; null: none are made.
    local_every: Positive | None = None
    # On each host; null: a folder of the user in its directory for temporary files.
    local_dir: LocalPath | None = None
    keep_last: Positive = 2
    keep_best: Count = 1
    best_metric: str = "eval/mean/loss"  # lower is better
    grace_seconds: Positive = 120
    retry_seconds: Count = 60  # for how long a write is tried again when the store fails
    save_timeout: Positive = 1200  # seconds for a save in the background
    save_base: bool = False  # with lora: also save the frozen parameters
    verify: bool = True  # compares the arrays with their checksums before they are read

    @model_validator(mode="after")
    def check(self) -> "Checkpoint":
        if self.local_every and self.local_every >= self.every:
            raise ValueError(
                f"local_every {self.local_every} has no effect beside every {self.every}: make it "
                f"smaller, or null"
            )
        if self.local_dir and not self.local_every:
            raise ValueError("local_dir has no effect without local_every; set both or none")
        return self


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
