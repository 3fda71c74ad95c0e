"""Glaive tool calls, the demo of LLaMA-Factory; rows {conversations, tools}."""

from typing import ClassVar

from moi_jax.data.tfds_datasets.json_rows import JsonRows

COMMIT = "e8e6af26514272e29a50649b38182beb4db4ebfa"


class Builder(JsonRows):
    """One split, train: 300 rows; larger sets of the same form go through manual_dir."""

    FILES: ClassVar = {"train": ("glaive_toolcall_en*.json*",)}
    URLS: ClassVar = {
        "train": f"https://raw.githubusercontent.com/hiyouga/LLaMA-Factory/{COMMIT}/"
        "data/glaive_toolcall_en_demo.json"
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Copy data/glaive_toolcall_en_demo.json of https://github.com/hiyouga/LLaMA-Factory (or "
        "any glaive_toolcall_en*.jsonl) into manual_dir."
    )
    DESCRIPTION = (
        "Conversations with function_call and observation turns and a JSON list of tools, "
        "written by a language model."
    )
    HOMEPAGE = "https://github.com/hiyouga/LLaMA-Factory/tree/main/data"
    LICENCE = "Apache-2.0"
    CITATION = """\
@inproceedings{zheng2024llamafactory,
  title = {LlamaFactory: Unified Efficient Fine-Tuning of 100+ Language Models},
  author = {Zheng, Yaowei and Zhang, Richong and Zhang, Junhao and Ye, Yanhan and
    Luo, Zheyan and Feng, Zhangchi and Ma, Yongqiang},
  booktitle = {ACL System Demonstrations},
  year = {2024}
}"""
