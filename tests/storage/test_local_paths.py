"""A URL where only a local path is taken: one line, and no folder that is named "s3:"."""

import importlib
import sys
from pathlib import Path

import pytest

from moi_jax.checkpoints.fetched import fetch_step
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config

from support.runs import small_config

TOLD = "is a URL, but only a local path is taken here"


@pytest.mark.parametrize(
    "arguments",
    [
        "convert import SRC --out URL",
        "convert import URL --out CKPT",
        "convert import SRC --out CKPT --tokenizer URL",
        "convert export CKPT --out URL",
        "convert verify CKPT --against URL",
        "evaluate CKPT --out URL",
        "evaluate CKPT --data URL",
        "evaluate CKPT --compare DIR URL",
        "evaluate CKPT --config URL",
        "evaluate CKPT --include-path URL",
        "generate CKPT --conversations FILE --out URL",
        "generate CKPT --conversations URL",
        "generate CKPT --tools URL",
        "prepare --config FILE --report URL",
        "audit RUN --out URL",
        "audit --check URL",
        "preview --config FILE --png URL",
        "preview --config FILE --stats --histogram URL",
    ],
)
@pytest.mark.parametrize("url", ["s3://bucket/x", "GS:bucket/x"])
def test_a_command_refuses_a_url_where_a_local_path_is_meant(
    arguments, url, tmp_path, monkeypatch, capsys
):
    command, *words = arguments.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command, *(url if word == "URL" else word for word in words)])
    with pytest.raises(SystemExit) as error:
        importlib.import_module(f"moi_jax.{command}").main()
    assert error.value.code == 2
    assert f"{url} {TOLD}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "override",
    [
        "tokenizer.path={}",
        "data.root={}",
        "data.domains=[{{name: a, sources: [{{path: '{}'}}]}}]",
        "data.decontaminate.path={}",
        "eval.benchmarks.data={}",
    ],
)
def test_a_config_refuses_a_url_where_a_local_path_is_meant(override, tmp_path):
    with pytest.raises(UserError, match=TOLD) as error:
        load_config(small_config(tmp_path), [override.format("s3://bucket/x")])
    assert override.partition("=")[0].split(".")[-1] in str(error.value)


def test_published_weights_at_a_url_are_told(s3):
    s3.put("published/config.json", b"{}")
    with pytest.raises(UserError, match="published weights, which are not read from a URL"):
        fetch_step(s3.place("published"))


def test_a_local_path_with_a_colon_is_one(tmp_path):
    config = load_config(small_config(tmp_path), ["data.root=a/b:c/d", "logging.run_dir=run:1"])
    assert (config.data.root, config.logging.run_dir) == (Path("a/b:c/d"), Path("run:1"))
