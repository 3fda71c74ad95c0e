"""Whether the quickstart showed what it is for: python .ci/check_quickstart.py RUN_DIR"""

import json
import sys
from pathlib import Path


def main(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if "token_loss" in record]
    assert losses[-1] < losses[0] / 2, f"the training loss fell from {losses[0]} to {losses[-1]}"
    evaluations = [record for record in records if "eval/mean/loss" in record]
    first, last = evaluations[0], evaluations[-1]
    names = [name for name in first if name.startswith("eval/")]
    assert len(names) == 2 * 5, names  # four domains and their mean, own and default prompt
    for name in names:
        assert last[name] < first[name], f"{name} rose from {first[name]} to {last[name]}"
    mixture = json.loads((run / "mixture.json").read_text(encoding="utf-8"))
    assert mixture["moved_share"] < 0.15, "too many instructions left the chunk they were drawn for"
    assert (run / "checkpoints" / str(last["step"]) / "parameters").is_dir()
    assert "<svg" in (run / "report.html").read_text(encoding="utf-8")
    print(f"quickstart: loss {losses[0]:.2f} -> {losses[-1]:.2f}, held-out losses fell everywhere")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
