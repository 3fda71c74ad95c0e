"""python -m moi_jax.train --config FILE [section.key=value ...]: fine-tune with MoI."""

import argparse
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from moi_jax.common.errors import UserError, run_command
from moi_jax.config.load import load_config
from moi_jax.config.schema import Config

if TYPE_CHECKING:
    from rich.console import Console

    from moi_jax.models.parameters import Tree


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.train",
        description="Fine-tunes a model on a mixture of chat data, as the config says.",
        epilog="A run that was stopped goes on where it was: give the same command again. Exit "
        "status: 0 done, 2 your mistake (one line says which), 1 a fault of ours, 128 + the "
        "signal's number after saving on SIGTERM or SIGINT.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see docs/config.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over FILE"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show the resolved config and stop"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="begin anew; an old run is moved aside, not deleted"
    )
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="go on with another optimizer, batch size or length of the run",
    )
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(config.to_yaml(), end="")
        return 0
    return train(config, fresh=args.fresh, allow_change=args.allow_change)


def train(config: Config, *, fresh: bool = False, allow_change: bool = False) -> int:
    """Runs, or goes on with, the training a config describes; returns the exit status.

    Raises:
      UserError: config, data, checkpoint or run directory do not allow it.
    """
    if config.train.deterministic:  # read by XLA when jax starts
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true"
    import jax
    from rich.console import Console

    from moi_jax.checkpoints.checkpoints import RunCheckpoints
    from moi_jax.common.console import say
    from moi_jax.evaluation.held_out import HeldOut
    from moi_jax.evaluation.while_training import make_benchmark
    from moi_jax.sampling.chat_model import make_chat_model
    from moi_jax.sampling.sample_answers import make_sample_answers
    from moi_jax.training.inputs import open_inputs, resolve
    from moi_jax.training.loop import fit
    from moi_jax.training.report import write_report
    from moi_jax.training.run_directory import move_aside, run_directory
    from moi_jax.training.setup import build_machine, start_run

    console = Console()
    with run_directory(config.logging.run_dir, fresh) as directory:
        resolved = resolve(config, None if fresh else directory)
        machine = build_machine(resolved)
        inputs = open_inputs(resolved, console)
        held_out = HeldOut(
            inputs.caches,
            inputs.selections,
            inputs.config.data,
            config.loss.targets,
            inputs.tokenizer,
            machine.microbatch_rows,
            machine.row_multiple,
            console,
        )
        sample = None
        if config.train.sample_prompts:
            sample = make_sample_answers(
                config.train.sample_prompts,
                config.train.sample_max_new_tokens,
                inputs.config.data,
                inputs.tokenizer,
                machine.make_model,
                inputs.model,
                machine.mesh,
            )

        benchmark = None
        if config.eval.generate.tasks:
            chat = make_chat_model(
                machine.make_model,
                inputs.model,
                inputs.tokenizer,
                inputs.config.data.default_system_prompt,
                mesh=machine.mesh,
            )
            benchmark = make_benchmark(config.eval.generate, directory / "benchmarks", chat)

        def evaluate(parameters: "Tree", give_up: Callable[[], bool]) -> dict[str, float]:
            return held_out.losses(lambda batch: machine.sums(parameters, batch), give_up)

        if fresh:
            _refuse_to_move(config.model.init_from, directory)
            move_aside(directory)
        opened = RunCheckpoints(directory / "checkpoints", config.checkpoint, inputs.items)
        # Closed however this ends: a save under way becomes whole first.
        with closing(opened) as checkpoints, jax.set_mesh(machine.mesh):
            run = start_run(
                inputs, machine, checkpoints, allow_change, evaluate, benchmark, sample, console
            )
            if run.step == run.steps:
                say(console, f"the run in {directory} is complete; --fresh begins anew")
            finished = fit(run)
        report = write_report(directory)
    if not finished:
        say(console, f"saved step {run.step} to {directory}; the same command goes on from there")
        return run.stop.exit_status
    _print_answers(directory, console)
    say(console, f"checkpoint {directory / 'checkpoints' / str(run.step)}")
    say(console, f"report     {report}")
    return 0


def _refuse_to_move(init_from: Path | None, directory: Path) -> None:
    """Raises UserError when --fresh would move aside what the new run begins from."""
    if init_from is None:
        return
    source, moved = init_from.expanduser().resolve(), directory.resolve()
    if moved == source or moved in source.parents:
        raise UserError(
            f"--fresh would move {init_from} aside, which model.init_from names; copy that "
            f"checkpoint elsewhere first"
        )


def _print_answers(directory: Path, console: "Console") -> None:
    """The sample answers before and after training, under each prompt."""
    import json

    from moi_jax.common.console import say

    path = directory / "samples.jsonl"
    if not path.exists():
        return
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for answer in answers:
        asked.setdefault((answer["domain"], answer["system"], answer["prompt"]), []).append(answer)
    for (domain, system, prompt), given in asked.items():
        say(console, f"{domain}, {system} system prompt")
        say(console, f"  user: {prompt}")
        for answer in given if len(given) == 1 else (given[0], given[-1]):
            say(console, f"  step {answer['step']}: {answer['answer']}")


if __name__ == "__main__":
    run_command(main)
