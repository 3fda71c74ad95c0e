"""The house rules that a machine can check: who imports whom, and light imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moi_jax"
COMMANDS = {"train", "prepare", "convert", "preview", "evaluate", "generate"}
SHARED = {"byte_level", "config", "config_file", "errors", "console", "report_page", "whole_files"}
MAY_IMPORT = {
    "models": SHARED,
    "tfds_datasets": set(),
    "data": SHARED | {"tfds_datasets"},
    "training": SHARED | {"models", "data"},
    "evaluation": SHARED | {"data", "models", "sampling"},
    "sampling": SHARED | {"models"},
}


def imported_rooms(path: Path) -> set[str]:
    """First parts under moi_jax of everything a file imports, at any depth of the code."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("moi_jax.")}
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) <= MAY_IMPORT[room] | {room}, path


def test_nothing_imports_a_command():
    for path in PACKAGE.rglob("*.py"):
        assert not imported_rooms(path) & COMMANDS, path


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


def test_every_link_in_the_docs_leads_somewhere():
    root = PACKAGE.parent
    for page in [root / "README.md", *(root / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
