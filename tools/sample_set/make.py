"""Writes the sample set: python tools/sample_set/make.py [--out DIR]

chat.jsonl (in the package) and functions.txt (beside this file) are written by hand; code.jsonl,
maths.jsonl, tools.jsonl and the tokenizer follow from them and a fixed seed, byte for byte.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from maths import maths_pairs
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from tools import tool_pairs

HERE = Path(__file__).parent
SAMPLES = HERE.parents[1] / "moi_jax" / "data" / "samples"
SEED = 2404
VOCABULARY = 2048
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the last ids, in this order
PROMPTS = {
    "chat": "You are a helpful assistant.",
    "code": "You are a programmer.",
    "maths": "You are a mathematician.",
    "tools": "You are an assistant that solves tasks with tools.",
}
# Qwen2's split: contractions, words, single digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

REQUESTS = (
    "Write a Python function `{name}` that {task}.",
    "Write a function called `{name}` in Python. It {task}.",
    "I need a Python function `{name}` that {task}.",
    "Please implement `{name}`, a function that {task}.",
    "Can you write a function that {task}? Call it `{name}`.",
    "How do I write a function `{name}` that {task}?",
)
INTRODUCTIONS = (
    "Here is the function with two checks:",
    "Here is `{name}`:",
    "You can write it like this:",
    "Sure, this function does it:",
)

Conversation = dict[str, list[dict[str, str]]]


def code_pairs(rng: Random, functions: str) -> list[tuple[str, str]]:
    """(request, answer) pairs for Python functions; runs the code of each answer with its asserts.

    There is one pair for each function, so no held-out answer is trained on in other words.

    Args:
      rng: chooses the phrasing, and two asserts for each row.
      functions: blocks of ``## what it does``, the function, a blank line, its asserts.
    """
    pairs = []
    for block in functions.split("## ")[1:]:
        task, source = block.strip().split("\n", 1)
        body, checks = source.rsplit("\n\n", 1)
        name = body.removeprefix("def ").split("(")[0]
        asserts = "\n".join(rng.sample(checks.split("\n"), 2))
        code = f"{body}\n\n{asserts}"
        exec(compile(code, name, "exec"), {})
        request = rng.choice(REQUESTS).format(name=name, task=task)
        introduction = rng.choice(INTRODUCTIONS).format(name=name)
        pairs.append((request, f"{introduction}\n\n```python\n{code}\n```"))
    return pairs


def conversations(pairs: list[tuple[str, str]]) -> list[Conversation]:
    """A conversation of a user and an assistant turn for each (question, answer) pair."""
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in pairs
    ]


def training_texts(domains: dict[str, list[Conversation]]) -> Iterator[str]:
    """Every text that the tokenizer encodes in training, as often as it does."""
    for domain, rows in domains.items():
        for row in rows:
            yield from ("system", PROMPTS[domain])
            for message in row["messages"]:
                yield from (message["role"], message["content"])


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE with Qwen2's normaliser and split; special tokens get the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    )
    return tokenizer


def write_json_lines(path: Path, rows: list[Conversation]) -> None:
    """Writes JSON Lines in UTF-8, with Unix line ends on every system."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def make_samples(out: Path) -> None:
    """Writes the four domains and the tokenizer into a directory.

    Raises:
      AssertionError: a function of functions.txt fails one of its asserts.
    """
    chat = (SAMPLES / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    functions = (HERE / "functions.txt").read_text(encoding="utf-8")
    rng = Random(SEED)
    domains = {
        "chat": [json.loads(line) for line in chat],
        "code": conversations(code_pairs(rng, functions)),
        "maths": conversations(maths_pairs(rng, per_template=9)),
        "tools": conversations(tool_pairs(rng, per_scenario=10)),
    }
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, rows in domains.items():
        write_json_lines(out / f"{name}.jsonl", rows)
    train_tokenizer(training_texts(domains)).save(str(out / "tokenizer" / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python tools/sample_set/make.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=SAMPLES, metavar="DIR")
    make_samples(parser.parse_args().out)
