"""The Dockerfile: what it installs for each accelerator, and what it keeps out of the image."""

import configparser
import os
import re
import subprocess

import pytest

from support.runs import ROOT

DOCKERFILE = (ROOT / "launch" / "docker" / "Dockerfile").read_text(encoding="utf-8")


def instructions():
    """The instructions of the Dockerfile as (name, rest), with continued lines joined."""
    code = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in code.splitlines() if line]


def install(accelerator, directory):
    """Runs the RUN instruction with a pip and a useradd that only print their arguments."""
    for name in ("pip", "useradd"):
        (directory / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (directory / name).chmod(0o755)
    (run,) = [rest for name, rest in instructions() if name == "RUN"]
    command = run.removeprefix("--mount=type=bind,target=/src,rw")
    environment = {"PATH": f"{directory}:{os.environ['PATH']}", "ACCELERATOR": accelerator}
    return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("accelerator", "package"), [("cpu", "/src"), ("tpu", "/src[tpu]"), ("cuda", "/src[cuda]")]
)
def test_an_accelerator_chooses_the_extra(accelerator, package, tmp_path):
    done = install(accelerator, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"pip install --no-cache-dir {package}"
    extra = package.removeprefix("/src").strip("[]")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert not extra or extra in setup["options.extras_require"]


def test_another_accelerator_is_refused(tmp_path):
    done = install("gpu", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ACCELERATOR is 'gpu'; use cpu, tpu or cuda\n"


def test_the_image_is_pinned_and_does_not_run_as_root():
    found = dict(instructions())
    assert re.fullmatch(r"python:3\.\d+-\S+", found["FROM"])
    assert int(found["USER"]) > 0


def test_the_image_gets_the_package_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    files = {
        setup["metadata"]["long_description"].removeprefix("file: "),
        setup["metadata"]["license_files"],
    }
    assert kept == {"moi_jax", "setup.cfg", "pyproject.toml", *files}
