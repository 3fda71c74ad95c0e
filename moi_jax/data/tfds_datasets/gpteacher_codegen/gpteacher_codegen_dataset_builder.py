"""GPTeacher code instructions in many languages; rows {instruction, input, response}."""

from typing import ClassVar

from moi_jax.data.tfds_datasets.json_rows import JsonRows

COMMIT = "8afcaaa7a11dd980162d861bd6be970f95eb7174"


class Builder(JsonRows):
    """One split, train. Tasks and solutions were written by a language model (GPT-4)."""

    FILES: ClassVar = {"train": ("codegen-instruct.json", "gpteacher_codegen*.json*")}
    URLS: ClassVar = {
        "train": f"https://raw.githubusercontent.com/teknium1/GPTeacher/{COMMIT}/"
        "Codegen/codegen-instruct.json"
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Copy Codegen/codegen-instruct.json of https://github.com/teknium1/GPTeacher (or any "
        "gpteacher_codegen*.jsonl) into manual_dir."
    )
    DESCRIPTION = "Programming tasks with solutions, written by GPT-4."
    HOMEPAGE = "https://github.com/teknium1/GPTeacher"
    LICENCE = "MIT"
    CITATION = """\
@misc{teknium2023gpteacher,
  title = {GPTeacher},
  author = {Teknium},
  howpublished = {https://github.com/teknium1/GPTeacher},
  year = {2023}
}"""
