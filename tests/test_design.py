"""The house rules that import-linter (setup.cfg) cannot check: light imports, no backend, links."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import ENVIRONMENT, ROOT, small_config

PACKAGE = Path(__file__).parent.parent / "moi_jax"
# A line that defines a name: a function, a class or a constant.
DEFINES = r"\s*(?:def|class) {0}\b|{0}\b.*="
COMMANDS = {"audit", "train", "prepare", "convert", "plan", "preview", "evaluate", "generate"}


def test_importing_the_package_imports_no_jax():
    code = "import sys, moi_jax; assert not {'jax', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_is_there_and_imports_no_jax(command):
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('moi_jax.{command}', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["prepare"], ["preview", "--stats"], ["preview", "--row", "0"]]
)
def test_prepare_and_preview_start_no_backend_of_jax(arguments, tmp_path):
    """So that data can be prepared and looked at on machines without the accelerator of a run."""
    command, *options = arguments
    code = (
        "import sys, runpy\n"
        f"try: runpy.run_module('moi_jax.{command}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as e: assert not e.code\n"
        "from jax._src import xla_bridge; assert not xla_bridge._backends, xla_bridge._backends"
    )
    config = str(small_config(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", config, *options],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_link_in_the_docs_leads_somewhere():
    root = PACKAGE.parent
    for page in [root / "README.md", *(root / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_a_link_to_a_line_leads_to_what_it_names():
    """[`name`](path#L12): line 12 defines `name`."""
    root = PACKAGE.parent
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    links = [
        (page, *link)
        for page in pages
        for link in re.findall(r"\[`(\w+)`\]\(([^)#]+)#L(\d+)\)", page.read_text(encoding="utf-8"))
    ]
    assert links
    for page, name, path, number in links:
        lines = (page.parent / path).read_text(encoding="utf-8").splitlines()
        found = [n for n, line in enumerate(lines, 1) if re.match(DEFINES.format(name), line)]
        assert int(number) in found, f"{page.name}: {name} is in line {found} of {path}"
