"""GSM8K: grade-school maths problems with worked answers; rows {question, answer}."""

from typing import ClassVar

from moi_jax.data.tfds_datasets.json_rows import JsonRows

COMMIT = "3101c7d5072418e28b9008a6636bde82a006892c"
FOLDER = (
    f"https://raw.githubusercontent.com/openai/grade-school-math/{COMMIT}/grade_school_math/data"
)


class Builder(JsonRows):
    """Splits train (7,473 rows) and test (1,319)."""

    FILES: ClassVar = {
        "train": ("train.jsonl", "gsm8k_train*.jsonl"),
        "test": ("test.jsonl", "gsm8k_test*.jsonl"),
    }
    URLS: ClassVar = {"train": f"{FOLDER}/train.jsonl", "test": f"{FOLDER}/test.jsonl"}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Copy train.jsonl and test.jsonl (or gsm8k_train*.jsonl, gsm8k_test*.jsonl) from "
        "grade_school_math/data of https://github.com/openai/grade-school-math into manual_dir."
    )
    DESCRIPTION = (
        "Grade-school maths word problems. The last line of an answer is '#### ' and the result; "
        "<<...>> marks the calculations."
    )
    HOMEPAGE = "https://github.com/openai/grade-school-math"
    LICENCE = "MIT"
    CITATION = """\
@article{cobbe2021gsm8k,
  title = {Training Verifiers to Solve Math Word Problems},
  author = {Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and Chen, Mark and Jun, Heewoo
    and Kaiser, Lukasz and Plappert, Matthias and Tworek, Jerry and Hilton, Jacob and
    Nakano, Reiichiro and Hesse, Christopher and Schulman, John},
  journal = {arXiv preprint arXiv:2110.14168},
  year = {2021}
}"""
