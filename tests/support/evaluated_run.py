"""A checkpoint that answers, and a run that is trained and evaluated: in the process of a test, or

    python -m tests.support.evaluated_run PLACE --coordinator ...

by joined processes. At the end these find that one of them lacks the data of a benchmark.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from moi_jax import generate
from moi_jax.cli.command import run_command
from moi_jax.config.load import load_config
from moi_jax.evaluation.evaluate import evaluate
from moi_jax.evaluation.options import (
    BenchmarkOptions,
    EvaluationRequest,
    HeldOutOptions,
    ModelOptions,
)
from moi_jax.evaluation.while_training import make_evaluations
from moi_jax.parallel.hosts import is_main
from moi_jax.training.train import train

MESH = "fsdp=2,tensor=2"


def generate_arguments(place: Path) -> list[str]:
    """The arguments of the command that answers PLACE/conversations.jsonl."""
    return [
        *(str(place / "ckpt"), "--conversations", str(place / "conversations.jsonl")),
        *("--out", str(place / "answers.jsonl"), "--max-new-tokens", "8"),
        *("--slots", "2", "--mesh", MESH),
    ]


def answer_train_and_evaluate(place: Path, device_count: int, join: Sequence[str] = ()) -> None:
    """Answers, trains as PLACE/config.yaml says, and evaluates the run into PLACE/out."""
    sys.argv = ["generate", *generate_arguments(place), *join]
    generate.main()  # it joins the processes, so jax is asked for its devices only then
    devices = jax.devices()[:device_count]
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
    place = Path(sys.argv[1])
    answer_train_and_evaluate(place, 4, join=sys.argv[2:])
    os.chdir(place if is_main() else place / "run")
    evaluate(request(place, Path("data"), place / "other"), jax.devices())
    return 0


if __name__ == "__main__":
    run_command(main)
