"""Tunes tiny models on calls of tools until they repeat them: python benchmarks/tool_round_trip.py

Makes a random Qwen2 model with Qwen2.5's chat template and a random Llama with Llama 3.1's. Each is
trained on three conversations with a tool and exported. transformers alone then answers the
questions, as does `python -m moi_jax.generate --tools`, and the answers must have the calls that
were trained on. Prints the loss and how many calls came back.

The templates are those of the package trl (pip install --no-deps trl), or of --templates DIR. Needs
the extra parity.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tokenizers
import yaml

from moi_jax.cli.command import run_command
from moi_jax.common.errors import UserError
from moi_jax.text.answers import call_objects, read_answer
from moi_jax.text.tokenizer import load_tokenizer

SAMPLES = Path(__file__).parents[1] / "moi_jax" / "data" / "samples"
LLAMA3 = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|finetune_right_pad_id|>"),
)
CASES = {
    "qwen2_5": ("Qwen2", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "llama3_1": ("Llama", {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}),
}
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALLS = [{"city": "Oslo", "days": 3}, {"city": "北京", "days": 2}, {"city": "Bern", "days": 5}]


def question(arguments: dict) -> dict:
    return {"role": "user", "content": f"How is the weather in {arguments['city']}?"}


def row(arguments: dict) -> dict:
    """A conversation with a call, its result and the answer."""
    call = {"name": "weather", "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {
        "tools": [TOOL],
        "messages": [
            question(arguments),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": call}],
            },
            {"role": "tool", "content": f"{arguments['days']} degrees"},
            {"role": "assistant", "content": f"It has {arguments['days']} degrees."},
        ],
    }


def publish(folder: Path, case: str, template: str) -> None:
    """A random model with the chat template, as transformers saves it."""
    import torch
    import transformers

    kind, named = CASES[case]
    backend = tokenizers.Tokenizer.from_file(str(SAMPLES / "tokenizer" / "tokenizer.json"))
    backend.add_special_tokens(list(LLAMA3))
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=backend.get_vocab_size(), **SIZES)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def run(module: str, *arguments: object) -> str:
    """The standard output of a command of moi_jax."""
    words = [sys.executable, "-m", f"moi_jax.{module}", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{module}: {done.stderr.splitlines()[-1]}")
    return done.stdout


def train(place: Path, steps: int) -> float:
    """Trains on the calls; returns the last loss."""
    (place / "calls.jsonl").write_text("".join(json.dumps(row(call)) + "\n" for call in CALLS))
    config = {
        "model": {"preset": None, "init_from": str(place / "published"), "remat": "none"},
        "data": {
            "root": str(place), "cache_dir": str(place / "cache"), "sequence_length": 1024,
            "max_repeats": 100_000, "default_domain": "tools",
            "held_out": {"fraction": 0, "min": 0},
            "domains": [{"name": "tools", "sources": [{"path": "calls.jsonl"}]}],
        },
        "optimizer": {"learning_rate": 5e-3},
        "train": {"steps": steps, "global_batch_rows": 1},
        "eval": {"every": 0},
        "checkpoint": {"every": steps},
        "logging": {"run_dir": str(place / "run"), "every": 20, "trackers": []},
    }  # fmt: skip
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    run("train", "--config", place / "config.yaml")
    records = map(json.loads, (place / "run" / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record][-1]


def by_transformers(folder: Path) -> list[list]:
    """The calls in the greedy answers of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    template = load_tokenizer(folder).template
    found = []
    for arguments in CALLS:
        prompt = tokenizer.apply_chat_template(
            [question(arguments)], tools=[TOOL], add_generation_prompt=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        written = model.generate(**prompt, max_new_tokens=80, do_sample=False)
        text = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])
        found.append(call_objects(read_answer(text, template, [json.dumps(TOOL)]).calls))
    return found


def by_generate(place: Path) -> list[list]:
    """The calls in what the command prints."""
    (place / "tools.json").write_text(json.dumps([TOOL]))
    common = ("--tools", place / "tools.json", "--max-new-tokens", 80, "--dtype", "float32")
    found = []
    for arguments in CALLS:
        lines = run("generate", place / "run", question(arguments)["content"], *common)
        found.append([json.loads(line) for line in lines.splitlines() if line.startswith("{")])
    return found


def templates(named: Path | None) -> Path:
    """The directory of the chat templates."""
    spec = importlib.util.find_spec("trl")
    if named is None and (spec is None or spec.origin is None):
        raise UserError("no templates: pip install --no-deps trl, or name a directory: --templates")
    return named or Path(spec.origin).parent / "chat_templates"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--templates", type=Path, metavar="DIR", help="of qwen2_5.jinja, ...")
    parser.add_argument("--steps", type=int, default=120, metavar="N")
    args = parser.parse_args()
    expected = [[{"name": "weather", "arguments": call}] for call in CALLS]
    failed = 0
    for case in CASES:
        template = (templates(args.templates) / f"{case}.jinja").read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            publish(place / "published", case, template)
            loss = train(place, args.steps)
            run("convert", "export", place / "run", "--out", place / "out")
            unchanged = (place / "out" / "chat_template.jinja").read_text() == template
            print(
                f"{case}: loss {loss:.4f} after {args.steps} steps; template unchanged: {unchanged}"
            )
            for what, found in (
                ("transformers", by_transformers(place / "out")),
                ("generate --tools", by_generate(place)),
            ):
                equal = sum(a == b for a, b in zip(found, expected, strict=True))
                failed += len(CALLS) - equal
                print(f"{case}: {what} makes {equal} of {len(CALLS)} calls")
    return int(failed > 0)


if __name__ == "__main__":
    run_command(main)
