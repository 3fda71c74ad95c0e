"""Shows the call stack from the command to attention, and the files that a train step uses.

    python benchmarks/frames.py

Trains the quickstart's model for one step. Prints the frames of this package on the stack when
attention is traced, and the files whose functions run in the step, with their numbers of lines.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import moi_jax
from moi_jax import train as command
from moi_jax.models import attention
from moi_jax.training import start

PACKAGE = Path(moi_jax.__file__).parent


def main() -> None:
    stack: list[traceback.FrameSummary] = []
    files: set[str] = set()
    reference = attention.xla_attention

    def watched_attention(*args: Any) -> Any:
        if sys.getprofile():  # within the step, whose last trace is the one with the gradient
            stack[:] = traceback.extract_stack()[:-1]
        return reference(*args)

    attention.xla_attention = watched_attention
    make_train_step = start.make_train_step

    def make_watched_step(*args: Any) -> Callable[..., Any]:
        step = make_train_step(*args)

        def watched_step(*step_args: Any) -> Any:
            sys.setprofile(lambda frame, event, _: note(frame, event))
            try:
                return step(*step_args)
            finally:
                sys.setprofile(None)

        return watched_step

    def note(frame: FrameType, event: str) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    start.make_train_step = make_watched_step
    with tempfile.TemporaryDirectory() as directory:
        sys.argv = [
            "moi_jax.train", "--config", "configs/quickstart.yaml", "train.steps=1",
            "model.attention=xla", "eval.every=0", "train.sample_prompts=[]",
            f"logging.run_dir={directory}/run",
            f"data.cache_dir={directory}/cache",
        ]  # fmt: skip
        command.main()

    ours = [frame for frame in stack if Path(frame.filename).is_relative_to(PACKAGE)]
    print(f"{len(ours) + 1} frames from the command to attention")
    for frame in ours:
        print(f"  {Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno} {frame.name}")
    print(f"  models/attention/xla.py {reference.__name__}")
    within = {Path(f) for f in files if Path(f).is_relative_to(PACKAGE)}
    within |= {Path(frame.filename) for frame in ours} | {PACKAGE / "models/attention/xla.py"}
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in within}
    print(f"{len(within)} files on the way and within the step, {sum(lines.values()):,} lines")
    for path, count in sorted(lines.items()):
        print(f"  {count:4} {path.relative_to(PACKAGE)}")


if __name__ == "__main__":
    main()
