"""Memory of generation on a CPU: python benchmarks/generation_memory.py CKPT

Answers one question with 64 tokens, once with stacked layers, which are unstacked beside them, and
once with layers that are taken apart when the checkpoint is opened, as the commands do. Each way
has a process of its own. Prints the bytes of the parameters, the memory of the process when it has
answered, and its largest one (Linux).
"""

import argparse
import subprocess
import sys
from pathlib import Path

import jax
from rich import filesize

from moi_jax.checkpoints.opener import open_checkpoint
from moi_jax.cli.command import run_command
from moi_jax.sampling.generate import generate
from moi_jax.sampling.requests import GenerationConfig
from moi_jax.text.conversations import Message
from moi_jax.text.rendering import render_prompt

WAYS = {"stacked": False, "by layer": True}


def answer(path: Path, by_layer: bool) -> str:
    """Generates, and returns what the process takes, as a line."""
    checkpoint = open_checkpoint(path, devices=jax.devices(), verify=False, by_layer=by_layer)
    question = [Message("user", "Name three fruits, and say which one you like best.")]
    prompt = render_prompt(question, checkpoint.tokenizer, checkpoint.system_prompt)
    generate(checkpoint, prompt, GenerationConfig(max_new_tokens=64))
    parameters = sum(x.nbytes for x in jax.tree.leaves(checkpoint.parameters))
    return f"parameters {filesize.decimal(parameters)}, {process_memory()}"


def process_memory() -> str:
    status = Path("/proc/self/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    now, most = (int(found[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return f"the process {filesize.decimal(now)}, at most {filesize.decimal(most)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/generation_memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--way", choices=WAYS, help="only this one, in this process")
    args = parser.parse_args()
    if args.way:
        print(f"{args.way}: {answer(args.checkpoint, WAYS[args.way])}")
        return 0
    for way in WAYS:
        subprocess.run([sys.executable, __file__, str(args.checkpoint), "--way", way], check=True)
    return 0


if __name__ == "__main__":
    run_command(main)
