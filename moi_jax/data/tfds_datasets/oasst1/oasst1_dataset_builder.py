"""OpenAssistant Conversations (oasst1): message trees; rows {message_tree_id, prompt, ...}."""

from typing import ClassVar

from moi_jax.data.tfds_datasets.json_rows import JsonRows

REVISION = "fdf72ae0827c1cda404aff25b6603abec9e3399b"
HUB = "https://huggingface.co/datasets/OpenAssistant/oasst1"


class Builder(JsonRows):
    """One split, train: 10,364 trees, a prompt and its ranked replies in turn, in 35 languages."""

    FILES: ClassVar = {"train": ("*ready.trees.jsonl*", "oasst*tree*.jsonl*")}
    URLS: ClassVar = {"train": f"{HUB}/resolve/{REVISION}/2023-04-12_oasst_ready.trees.jsonl.gz"}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Copy 2023-04-12_oasst_ready.trees.jsonl.gz of {HUB} (or any oasst*tree*.jsonl) into "
        "manual_dir."
    )
    DESCRIPTION = "Conversations written and ranked by volunteers, as trees of messages."
    HOMEPAGE = HUB
    LICENCE = "Apache-2.0"
    CITATION = """\
@inproceedings{kopf2023openassistant,
  title = {OpenAssistant Conversations: Democratizing Large Language Model Alignment},
  author = {K{\\"o}pf, Andreas and Kilcher, Yannic and others},
  booktitle = {NeurIPS Datasets and Benchmarks},
  year = {2023}
}"""
