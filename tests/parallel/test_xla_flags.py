"""The flags of XLA: for which platform, beside those of the user, and known to the compilers."""

import importlib.util
import os
import subprocess
import sys

import pytest
import yaml

from moi_jax.config.load import load_config
from moi_jax.parallel import xla_flags
from moi_jax.parallel.xla_flags import (
    GPU_FLAGS,
    TPU_FLAGS,
    apply_flags,
    describe_flags,
    likely_platform,
    missing_flags,
)

from support.runs import ROOT

UNKNOWN = "--xla_tpu_no_such_flag=true", "--xla_gpu_no_such_flag=true"
# A tiny program for a described TPU. libtpu reads its variable when it is loaded.
FOR_TPU = """
import jax
from jax.experimental import topologies
[chip, *_] = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
place = jax.sharding.SingleDeviceSharding(chip)
square = jax.ShapeDtypeStruct((128, 128), "bfloat16", sharding=place)
jax.jit(lambda x: x @ x).lower(square).compile()
"""
FOR_CPU = "import jax; print(jax.jit(lambda x: x + 1)(1), jax.config.jax_optimization_level)"


def run(code, platform, **variables):
    """Runs code in a process that has the flags of a platform."""
    head = f"from moi_jax.parallel.xla_flags import apply_flags; apply_flags({platform!r})\n"
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **variables,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, cwd=ROOT,
        env=environment, check=False,
    )  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is missing: pip install '.[plan]'"
)
def test_libtpu_knows_each_flag_of_a_tpu():
    done = run(FOR_TPU, "tpu")
    assert done.returncode == 0, done.stderr
    done = run(FOR_TPU, "tpu", LIBTPU_INIT_ARGS=UNKNOWN[0])
    assert done.returncode != 0
    assert "xla_tpu_no_such_flag" in done.stderr


def test_jaxlib_knows_each_flag_of_a_gpu():
    done = run(FOR_CPU, "gpu")
    assert (done.returncode, done.stdout.split()) == (0, ["2", "O1"]), done.stderr
    done = run(FOR_CPU, "gpu", XLA_FLAGS=UNKNOWN[1])
    assert done.returncode != 0
    assert "xla_gpu_no_such_flag" in done.stderr


@pytest.mark.parametrize(
    ("named", "files", "installed", "platform"),
    [
        ("cuda,cpu", [], [], "gpu"),
        ("tpu", [], [], "tpu"),
        ("cpu", ["dev/nvidia0"], ["jax_cuda13_plugin"], "cpu"),
        ("", ["dev/nvidia0"], ["jax_cuda13_plugin"], "gpu"),
        ("", ["dev/nvidiactl"], ["jax_cuda12_plugin"], "gpu"),
        ("", ["dev/nvidia0"], [], "cpu"),
        ("", ["dev/accel0"], ["libtpu"], "tpu"),
        ("", ["dev/vfio/0"], ["libtpu"], "tpu"),
        ("", ["dev/vfio/vfio"], ["libtpu"], "cpu"),
        ("", [], ["libtpu", "jax_cuda13_plugin"], "cpu"),
    ],
)
def test_the_platform_is_recognised_without_jax(
    tmp_path, monkeypatch, named, files, installed, platform
):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setenv("JAX_PLATFORMS", named)
    monkeypatch.setattr(xla_flags, "_installed", installed.__contains__)
    assert likely_platform(str(tmp_path)) == platform


def test_a_flag_of_the_user_wins_and_the_others_are_added(monkeypatch):
    own = "--xla_tpu_scoped_vmem_limit_kib=65536 --xla_other=1"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
    apply_flags("tpu")
    given = os.environ["LIBTPU_INIT_ARGS"]
    assert given.startswith(own)
    assert given.count("xla_tpu_scoped_vmem_limit_kib") == 1
    names = {word.lstrip("-").partition("=")[0] for word in given.split()}
    assert {flag.name for flag in TPU_FLAGS} < names
    apply_flags("tpu")
    assert os.environ["LIBTPU_INIT_ARGS"] == given


def test_what_the_user_gave_as_a_whole_is_left_alone(monkeypatch):
    """A level of jax, a file of flags, and the switch."""
    level, *flags = GPU_FLAGS
    assert level not in missing_flags("gpu", {"JAX_OPTIMIZATION_LEVEL": "O0"})
    assert missing_flags("gpu", {"XLA_FLAGS": "flags.txt"}) == [level]
    assert missing_flags("gpu", {"XLA_FLAGS": "--xla_dump_to=d"}) == [level, *flags]
    assert missing_flags("gpu", {"MOI_JAX_XLA_FLAGS": "off"}) == []
    assert missing_flags("cpu", {}) == []


def test_print_config_shows_the_flags_and_is_still_a_config(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moi_jax.train", "--config", "configs/quickstart.yaml",
         "--print-config"],
        capture_output=True, text=True, cwd=ROOT, check=True,
        env={**os.environ, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""},
    )  # fmt: skip
    for flag in GPU_FLAGS:
        assert f"# {flag.variable} {flag}  (" in done.stdout
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout)
    assert load_config(path) == load_config(ROOT / "configs" / "quickstart.yaml")


def test_shown_flags_are_comments_of_yaml(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    for platform in ("tpu", "gpu", "cpu"):
        assert yaml.safe_load(describe_flags(platform)) is None
    assert "scoped_vmem" not in describe_flags("tpu")
