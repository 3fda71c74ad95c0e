"""A small run that is trained and evaluated, in the process of a test or on simulated hosts.

python -m tests.support.evaluated_run PLACE, with the options that join processes.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from moi_jax.cli.arguments import add_hosts
from moi_jax.cli.command import run_command
from moi_jax.cli.hosts import join_hosts
from moi_jax.common.log import show_logs
from moi_jax.config import Cluster
from moi_jax.config.load import load_config
from moi_jax.evaluation.evaluate import evaluate
from moi_jax.evaluation.options import (
    BenchmarkOptions,
    EvaluationRequest,
    HeldOutOptions,
    ModelOptions,
)
from moi_jax.evaluation.while_training import make_evaluations
from moi_jax.parallel.hosts import process_index
from moi_jax.training.train import train

MESH = "fsdp=2,tensor=2"


def train_and_evaluate(place: Path, devices: Sequence[jax.Device]) -> None:
    """Trains as PLACE/config.yaml says, and evaluates the run into PLACE/out."""
    config = load_config(place / "config.yaml", [])
    train(config, make_evaluations=make_evaluations, devices=devices)
    evaluate(request(place, place / "data", place / "out"), devices)


def request(place: Path, data: Path, out: Path) -> EvaluationRequest:
    """Held-out losses, generated answers, and likelihoods."""
    return EvaluationRequest(
        place / "run",
        BenchmarkOptions(data, out, max_new_tokens=6, mmlu_method="likelihood"),
        ("held_out", "gsm8k", "mmlu"),
        model=ModelOptions(mesh=MESH, slots=2),
        held_out=HeldOutOptions(limit=2),
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    add_hosts(parser)
    args = parser.parse_args()
    show_logs(process_index=process_index)
    join_hosts(args, Cluster())
    train_and_evaluate(args.place, jax.devices())
    # Now the data of a benchmark is where process 0 looks for it, and nowhere else.
    os.chdir(args.place if process_index() == 0 else args.place / "run")
    evaluate(request(args.place, Path("data"), args.place / "other"), jax.devices())
    return 0


if __name__ == "__main__":
    run_command(main)
