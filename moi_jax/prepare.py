"""python -m moi_jax.prepare --config FILE: sources into the tokenised cache, with the mixture."""

import argparse

from moi_jax.config_file import load_config
from moi_jax.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.prepare",
        description="Reads the sources of a config, renders and tokenises them into the cache, "
        "plans the first epoch and shows the mixture. Training does the same by itself.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see docs/config.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over FILE"
    )
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)

    from rich.console import Console

    from moi_jax.data.run_plan import RunPlan
    from moi_jax.training.inputs import open_inputs, resolve

    console = Console()
    inputs = open_inputs(resolve(config), console)
    plan = RunPlan(inputs.corpus, inputs.config.data, inputs.config.train)
    inputs.show_mixture(plan, console)


if __name__ == "__main__":
    run_command(main)
