"""What the commands ask of jax before it is imported; where it keeps compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moi_jax.cli.jax_environment import prepare_jax
from moi_jax.config.load import make_config

from support.runs import ROOT

PLACE = "JAX_COMPILATION_CACHE_DIR"
DOMAINS = [{"name": "chat", "sources": [{"path": "chat.jsonl"}]}]
# A process that compiles a program, which jax keeps however fast it was compiled.
COMPILES = """
import sys, resource, signal
from pathlib import Path
from moi_jax.cli.jax_environment import prepare_jax
prepare_jax(Path(sys.argv[1]))
import jax
program = jax.jit(lambda x: x * 3 + 1)
if sys.argv[2] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file can grow any more
print(program(2))
"""


def run(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != PLACE} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT,
        env=environment, check=False,
    )  # fmt: skip


def compiles(place: Path, disk: str = "empty") -> subprocess.CompletedProcess[str]:
    least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    return run(COMPILES, str(place), disk, **{least: "0"})


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (["train", "--config", "configs/quickstart.yaml"], "runs/cache/xla"),
        (["evaluate", "nowhere"], "~/.cache/moi_jax/xla"),
        (["generate", "nowhere", "Hello"], "~/.cache/moi_jax/xla"),
        (["audit", "nowhere"], "~/.cache/moi_jax/xla"),
    ],
)
def test_a_command_asks_before_it_imports_jax(command, place):
    code = (
        "import sys, runpy, moi_jax.cli.jax_environment as e\n"
        "def asked(place):\n"
        "    assert 'jax' not in sys.modules\n"
        "    print(place), sys.exit(0)\n"
        "e.prepare_jax = asked\n"
        "name = sys.argv.pop(1)\n"
        "runpy.run_module('moi_jax.' + name, run_name='__main__', alter_sys=True)"
    )
    done = run(code, *command)
    assert (done.returncode, done.stdout.strip()) == (0, place), done.stderr


def test_programs_are_kept_where_the_config_says():
    def place(**sections):
        config = make_config({"data": {"domains": DOMAINS}} | sections)
        return config.train.compilation_cache

    assert place() == Path("~/.cache/moi_jax/xla")
    data = {"domains": DOMAINS, "cache_dir": "/disk"}
    assert place(data=data) == Path("/disk/xla")
    assert place(data=data, train={"compilation_cache": "/other"}) == Path("/other")
    assert place(data=data, train={"compilation_cache": None}) is None


def test_the_environment_wins_and_an_unknown_home_keeps_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv(PLACE, "/own")
    prepare_jax(tmp_path)
    assert os.environ[PLACE] == "/own"
    monkeypatch.delenv(PLACE)
    prepare_jax(None)
    prepare_jax(Path("~no-such-user/xla"))
    assert PLACE not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare_jax(Path("~/xla"))
    assert os.environ[PLACE] == str(tmp_path / "xla")


def test_a_compiled_program_is_kept(tmp_path):
    done = compiles(tmp_path / "xla")
    assert (done.returncode, done.stdout.strip()) == (0, "7"), done.stderr
    assert list((tmp_path / "xla").glob("jit__lambda*"))


@pytest.mark.parametrize("disk", ["refused", "full"])
def test_a_place_that_cannot_be_written_is_a_warning(tmp_path, disk):
    place = tmp_path / "xla"
    if disk == "refused":
        place.write_text("a file")
    done = compiles(place, disk)
    assert (done.returncode, done.stdout.strip()) == (0, "7"), done.stderr
    assert "persistent compilation cache" in done.stderr
