"""The sections `checkpoint` and `logging`: what a run leaves on disk, and where."""

from pathlib import Path
from typing import Literal

from moi_jax.config.section import Count, Positive, Section


class Checkpoint(Section):
    every: Positive = 500
    keep_last: Positive = 2
    keep_best: Count = 1
    best_metric: str = "eval/mean/loss"  # lower is better
    grace_seconds: Positive = 120


class Logging(Section):
    run_dir: Path = Path("runs/moi")
    every: Positive = 10
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
