"""Every command and Python block of README and docs, run as it stands there."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from support.commands import run_here
from support.runs import ENVIRONMENT, ROOT
from support.xla import QUICK_COMPILATION

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ["train.steps=1", "train.sample_max_new_tokens=2"]
# Run by .ci/run itself, or in need of files that are not ours to ship (the weights of Qwen,
# public sets and benchmarks): their parts are tested in test_convert.py, test_start.py, test_run.py
# and test_evaluate_command.py.
NOT_HERE = (
    *("Qwen-7B-Chat", "qwen_7b", "qwen2.5_0.5b", "data.root=", "CKPT"),
    *("make ", "runs/quickstart", "runs/tools", "python docs/", "python benchmarks/"),
)
# These start no backend of jax (tests/test_design.py), so they may run in the process of the tests.
DATA_ALONE = r"moi_jax\.(prepare|preview)"


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^    ((?:\w+=\S+ +)?(?:python|make) .*)$", text, re.MULTILINE)
    return sorted({" ".join(command.split("#")[0].split()) for command in found})


RUNNABLE = [c for c in commands() if not any(mark in c for mark in NOT_HERE) and "[" not in c]


def test_there_are_commands_to_run():
    assert len(RUNNABLE) >= 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The prepared data of all commands: most ask for the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("command", [c for c in RUNNABLE if re.search(DATA_ALONE, c)])
def test_a_command_on_data_of_the_docs_runs(command, cache, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = run_here(*shlex.split(command)[2:], f"data.cache_dir={cache}")
    shown = capsys.readouterr()
    assert not status, shown.err
    if command.endswith("--row 3"):
        page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
        (row,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
        assert row in shown.out


@pytest.mark.parametrize("command", [c for c in RUNNABLE if not re.search(DATA_ALONE, c)])
def test_a_command_of_the_docs_runs(command, cache, tmp_path):
    words = shlex.split(command)
    environment = dict(ENVIRONMENT)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = f"{QUICK_COMPILATION} {value}" if name == "XLA_FLAGS" else value
    if "moi_jax.train" in words:
        words = [word for word in words if not word.startswith(("train.steps", "logging.run_dir"))]
        words += [*SHORT, f"logging.run_dir={tmp_path / 'run'}"]
    words += [f"data.cache_dir={cache}"]
    done = subprocess.run(
        [sys.executable, *words[1:]],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_python_block_on_batches_runs(monkeypatch, capsys):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(block, {})
    assert capsys.readouterr().out.startswith("(2, 1024)")


def test_the_python_block_on_training_runs(tmp_path):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shorter = ("train.steps=20", 'train.steps=1", "train.sample_prompts=[]')
    for written, here in (shorter, ("runs/notebook", str(tmp_path / "run"))):
        assert block.count(written) == 1
        block = block.replace(written, here)
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    result = done.stdout.splitlines()[-1].split()
    assert result[:2] == ["1", "True"]
    assert float(result[2]) > 0
    assert result[3] == str(tmp_path / "run" / "checkpoints" / "1")


def test_the_row_on_decontamination_is_a_hit(tmp_path):
    from moi_jax.data.decontamination import Benchmarks

    page = (ROOT / "docs" / "decontamination.md").read_text(encoding="utf-8")
    question, row = re.findall(r"^    (\{.*\})$", page, re.MULTILINE)
    (tmp_path / "test.jsonl").write_text(question, encoding="utf-8")
    assert Benchmarks.read(tmp_path).hit(json.loads(row)["question"]) == "test.jsonl:1"


def test_the_defaults_of_the_config_page_are_the_defaults():
    import yaml

    from moi_jax.config.load import make_config

    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    written = yaml.safe_load(block)
    resolved = make_config({}).model_dump(mode="json")
    assert written.keys() == resolved.keys()
    for section, keys in resolved.items():
        assert written[section].keys() == keys.keys(), section
        for key, value in keys.items():
            # Left open on the page: resolved from the strategy or the number of domains.
            if (section, key) != ("data", "chunk_size"):
                assert written[section][key] == value, f"{section}.{key}"
