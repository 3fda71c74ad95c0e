"""docs/tutorial.md from its first command to the last, in order, with a tiny model."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from support.published import micro_published
from support.runs import ENVIRONMENT, ROOT
from support.xla import xla_flags

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
# Eight simulated devices in the place of eight chips; a tiny model in that of the 7B one.
DEVICES = {**ENVIRONMENT, "XLA_FLAGS": xla_flags(devices=8)}
SMALL = [
    "model.preset=micro", "data.sequence_length=512", "train.epochs=null", "train.steps=2",
    "train.global_batch_rows=8", "train.microbatch_rows=8", "data.cache_dir=cache",
]  # fmt: skip
DOMAINS = ("chat", "code", "maths", "tools")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A directory as the reader has it before the first command."""
    import numpy as np

    place = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "configs", place / "configs")
    micro_published(place / "Qwen-7B-Chat", np.float32)
    # Qwen v1 came without a Jinja template: its default prompt is that of its architecture.
    (place / "Qwen-7B-Chat" / "tokenizer_config.json").write_text("{}")
    (rows,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    for domain, row in zip(DOMAINS, rows.splitlines(), strict=True):
        (place / "my_data" / domain).mkdir(parents=True)
        (place / "my_data" / domain / "shown.jsonl").write_text(row + "\n", encoding="utf-8")
        questions = [{"question": f"{domain} {n}?", "answer": f"It is {n}."} for n in range(30)]
        more = "".join(json.dumps(question) + "\n" for question in questions)
        (place / "my_data" / domain / "more.jsonl").write_text(more, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def workplace(before):
    """The same directory after every marked command ran, in order.

    A new process begins with evaluate: like a reader's, it has nothing in memory of those before.
    """
    commands = re.findall(r"^    (python -m .*?)\s+#$", PAGE, re.MULTILINE)
    assert len(commands) == 10
    words = [shlex.split(command)[2:] + SMALL * ("--config" in command) for command in commands]
    (evaluate,) = (n for n, command in enumerate(words) if command[0] == "moi_jax.evaluate")
    for part in (words[:evaluate], words[evaluate:]):
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.commands"],
            input=json.dumps(part), capture_output=True, text=True, cwd=before, check=False,
            env={**DEVICES, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    return before


def test_every_marked_command_runs_in_order(workplace):
    assert (workplace / "runs" / "qwen_7b_moi" / "report.html").exists()


def test_the_exported_folder_answers_in_transformers(workplace, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(workplace)
    exec(code, {})
    shown = capsys.readouterr().out
    assert "<|im_start|>user\nWhat is 12 times 3?<|im_end|>" in shown
    assert "You are a helpful assistant." in shown
