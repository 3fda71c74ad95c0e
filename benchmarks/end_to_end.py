"""Everything in a row on two processes: python benchmarks/end_to_end.py

A published model (a small random Qwen2 that transformers writes) is imported, trained by two
processes on a mesh of fsdp 2 x tensor 2, killed, resumed, evaluated and asked by two processes and
by one, exported, and loaded by transformers. Each line is something that was compared. It ends with
status 1 at the first difference. It needs torch.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "moi_jax" / "data" / "samples"
STEPS = 16
LIMIT = 900  # seconds for a command
ENVIRONMENT = {
    **os.environ,
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "DEVICES": "2",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        ENVIRONMENT["LOGS"] = str(work / "logs")
        published = publish(work / "published")
        command("convert", "import", published, "--out", work / "imported")
        config = write_config(work, work / "imported")
        run = train_with_a_kill(work, config)
        step = run / "checkpoints" / str(STEPS)
        evaluations_agree(work, step)
        answers_agree(work, step)
        command("convert", "export", step, "--out", work / "exported")
        transformers_agrees(work / "exported", step)


def publish(folder: Path) -> Path:
    """Lays out a random model as its publisher would, with the tokenizer of the samples."""
    folder.mkdir()
    for file in (SAMPLES / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokens = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    config = transformers.Qwen2Config(
        vocab_size=-(-(tokens + 16) // 64) * 64,
        hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def write_config(work: Path, start: Path) -> Path:
    values = {
        "model": {"init_from": str(start), "compute_dtype": "float32", "remat": "none"},
        "data": {
            "root": str(SAMPLES),
            "cache_dir": str(work / "cache"),
            "sequence_length": 256,
            "max_repeats": 100,
            "domains": [
                {"name": "chat", "sources": [{"path": "chat.jsonl"}]},
                {
                    "name": "maths",
                    "prompt": "You are a mathematician.",
                    "sources": [{"path": "maths.jsonl"}],
                },
            ],
        },
        "optimizer": {"learning_rate": 1e-3},
        "mesh": {"fsdp": 2, "tensor": 2},
        "train": {"steps": STEPS, "global_batch_rows": 4},
        "eval": {"every": 8},
        "checkpoint": {"every": 4},
        "logging": {"every": 1, "trackers": [], "run_dir": str(work / "run")},
        "cluster": {"lost_seconds": 10},
    }
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(name: str, *arguments: object, processes: int = 1) -> str:
    """Runs a command in so many processes; returns what it printed."""
    if processes == 1:
        line = [sys.executable, "-m", f"moi_jax.{name}", *map(str, arguments)]
        flags = "--xla_force_host_platform_device_count=4"
        environment = {**ENVIRONMENT, "XLA_FLAGS": flags}
    else:
        line, environment = local(name, *arguments, processes=processes), ENVIRONMENT
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT
    )
    if done.returncode:
        sys.exit(f"{name} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def local(name: str, *arguments: object, processes: int) -> list[str]:
    return [str(ROOT / "launch/local/run.sh"), str(processes), name, *map(str, arguments)]


def train_with_a_kill(work: Path, config: Path) -> Path:
    """Trains on two processes, kills one of them with SIGKILL, and resumes."""
    run = work / "run"
    environment = {**ENVIRONMENT, "LOGS": str(work / "logs-of-the-killed")}
    process = subprocess.Popen(
        local("train", "--config", config, processes=2),
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (run / "checkpoints" / "4").exists() and process.poll() is None:
        time.sleep(0.05)
    found = subprocess.run(
        ["pgrep", "-f", f"{config} .*--process-id 1"], capture_output=True, text=True, check=False
    )
    for number in found.stdout.split():
        os.kill(int(number), signal.SIGKILL)
    status = process.wait(LIMIT)
    log = (work / "logs-of-the-killed/process-0.log").read_text().splitlines()
    tell("process 1 killed", status in (75, 137), f"status {status}; process 0: {log[-1]}")
    told = command("train", "--config", config, processes=2)
    resumed = [line for line in told.splitlines() if line.startswith("resuming from step")]
    tell("the same command again", len(resumed) == 1, "; ".join(resumed))

    alone = work / "alone"
    command("train", "--config", config, f"logging.run_dir={alone}")
    ours, theirs = losses(run), losses(alone)
    differs = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    what = f"{len(ours)} losses of {STEPS} steps within {differs:.1e} of one process's"
    tell("trained, killed, resumed", differs <= 2e-5, what)
    return run


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [value for record in records for name, value in record.items() if name.endswith("loss")]


def evaluations_agree(work: Path, step: Path) -> None:
    means = []
    for processes in (2, 1):
        out = work / f"evaluated-{processes}"
        command("evaluate", step, "--out", out, "--limit", 8, processes=processes)
        held_out = json.loads((out / "held_out.json").read_text())
        means.append(np.array(numbers(held_out["models"])))
    # Perplexities and effects in percent are large: of what is over 1, the share counts.
    differs = (np.abs(means[0] - means[1]) / np.maximum(1, np.abs(means[1]))).max()
    what = f"{len(means[0])} figures within {differs:.1e} of one process's"
    tell("evaluated", differs <= 2e-5, what)


def numbers(value: object) -> list[float]:
    """All finite numbers in nested JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [float(value)] if isinstance(value, int | float) and np.isfinite(value) else []


def answers_agree(work: Path, step: Path) -> None:
    questions = work / "questions.jsonl"
    lines = (SAMPLES / "maths.jsonl").read_text().splitlines()[:6]
    asked = [json.loads(line)["messages"][:1] for line in lines]
    questions.write_text("".join(json.dumps({"messages": one}) + "\n" for one in asked))
    texts = []
    for processes in (2, 1):
        out = work / f"answers-{processes}.jsonl"
        options = ("--conversations", questions, "--out", out, "--max-new-tokens", 24)
        command("generate", step, *options, processes=processes)
        texts.append(out.read_text())
    tell("asked", texts[0] == texts[1], f"{len(lines)} greedy answers equal to one process's")


def transformers_agrees(exported: Path, step: Path) -> None:
    report = json.loads(command("convert", "verify", step, "--against", exported, "--json"))
    logits = report["logits"]["max_abs"]
    what = f"transformers loads the export: logits within {logits:.1e}, all tensors equal"
    tell("exported", report["verdict"] == "equal" and logits <= 1e-4, what)


def tell(what: str, holds: bool, detail: str) -> None:
    print(f"{'ok    ' if holds else 'DIFFERS'} {what}: {detail}", flush=True)
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    main()
