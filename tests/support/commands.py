"""Commands without a process of their own for each: imports alone take one two seconds.

    python -m tests.support.commands <LISTS

runs the commands of a JSON list, such as [["moi_jax.train", "--config", "x.yaml"]], one after
another, and ends at the first that fails.
"""

import json
import runpy
import sys


def run_here(module: str, *arguments: str) -> int | str | None:
    """Runs `python -m MODULE ARGUMENTS` in this process; returns its exit status."""
    before = sys.argv
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    for command in json.load(sys.stdin):
        if status := run_here(*command):
            sys.exit(f"{' '.join(command)}\nended with exit status {status}")
