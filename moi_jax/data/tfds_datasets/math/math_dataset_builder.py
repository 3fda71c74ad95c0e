"""MATH (Hendrycks et al.): competition problems; rows {problem, level, type, solution}."""

from typing import ClassVar

from moi_jax.data.tfds_datasets.json_rows import JsonRows


class Builder(JsonRows):
    """Splits train (7,500 rows) and test (5,000), from local copies alone."""

    FILES: ClassVar = {
        "train": ("train.jsonl", "*math_train*.jsonl", "**/train/*/*.json"),
        "test": ("test.jsonl", "*math_test*.jsonl", "**/test/*/*.json"),
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The authors' archive is no longer online, so the set is not downloaded. Unpack a copy "
        "(MATH/train/<subject>/<n>.json, MATH/test/...) into manual_dir, or put train.jsonl and "
        "test.jsonl there, one problem a line."
    )
    DESCRIPTION = (
        "Problems of mathematics competitions in seven subjects and five levels; the answer is "
        "the last \\boxed{} of the solution."
    )
    HOMEPAGE = "https://github.com/hendrycks/math"
    LICENCE = "MIT"
    CITATION = """\
@article{hendrycks2021math,
  title = {Measuring Mathematical Problem Solving With the MATH Dataset},
  author = {Hendrycks, Dan and Burns, Collin and Kadavath, Saurav and Arora, Akul and
    Basart, Steven and Tang, Eric and Song, Dawn and Steinhardt, Jacob},
  journal = {NeurIPS},
  year = {2021}
}"""
