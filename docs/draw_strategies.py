"""Draws the first row of each strategy on the sample set: python docs/draw_strategies.py [DIR]"""

import sys
from pathlib import Path

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.common.log import show_logs
from moi_jax.config import STRATEGIES
from moi_jax.config.load import load_config
from moi_jax.data.dataset import open_dataset
from moi_jax.data.preview.picture import draw_row
from moi_jax.data.preview.row import view_row

HERE = Path(__file__).parent


def main(directory: Path) -> None:
    show_logs(stderr=True)
    for strategy in STRATEGIES:
        config = load_config(
            HERE.parent / "configs" / "quickstart.yaml", [f"data.strategy={strategy}"]
        )
        experiment = open_experiment(config)
        dataset = open_dataset(experiment.config, experiment.tokenizer)
        run = dataset.plan()
        first = view_row(dataset.batch_reader(run), 0, dataset.tokenizer)
        draw_row(first, directory / f"strategy_{strategy}.png")
        if strategy == "moi":  # the picture of the README
            draw_row(first, directory / "row.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
