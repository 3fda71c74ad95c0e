"""MBPP: basic Python tasks with tests; rows {text, code, task_id, test_list, ...}."""

from typing import Any, ClassVar

from moi_jax.data.tfds_datasets.json_rows import JsonRows

COMMIT = "4700efb9afa54286b0e04473ba80a13e8461e25f"
URL = f"https://raw.githubusercontent.com/google-research/google-research/{COMMIT}/mbpp/mbpp.jsonl"
# The authors' splits by task_id; `prompt` holds the examples of the few-shot prompt.
SPLITS = {
    "train": range(601, 975),
    "validation": range(511, 601),
    "test": range(11, 511),
    "prompt": range(1, 11),
}


class Builder(JsonRows):
    """Splits train (374 rows), validation (90), test (500) and prompt (10), all of one file."""

    FILES: ClassVar = dict.fromkeys(SPLITS, ("mbpp.jsonl",))
    URLS: ClassVar = dict.fromkeys(SPLITS, URL)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Copy mbpp/mbpp.jsonl of https://github.com/google-research/google-research into "
        "manual_dir."
    )
    DESCRIPTION = "Crowd-sourced Python tasks, each a sentence, a solution and three tests."
    HOMEPAGE = "https://github.com/google-research/google-research/tree/master/mbpp"
    LICENCE = "CC BY 4.0"
    CITATION = """\
@article{austin2021program,
  title = {Program Synthesis with Large Language Models},
  author = {Austin, Jacob and Odena, Augustus and Nye, Maxwell and Bosma, Maarten and
    Michalewski, Henryk and Dohan, David and Jiang, Ellen and Cai, Carrie and Terry, Michael and
    Le, Quoc and Sutton, Charles},
  journal = {arXiv preprint arXiv:2108.07732},
  year = {2021}
}"""

    def belongs(self, row: dict[str, Any], split: str) -> bool:
        return row["task_id"] in SPLITS[split]
