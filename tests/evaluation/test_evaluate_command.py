"""python -m moi_jax.evaluate on a run that was trained with benchmarks, and what it refuses."""

import hashlib
import json
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file

from moi_jax import evaluate
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.common.errors import UserError
from moi_jax.evaluation import evaluate as evaluation
from moi_jax.evaluation.evaluate import evaluate as evaluate_checkpoint
from moi_jax.evaluation.options import (
    BenchmarkOptions,
    EvaluationRequest,
    HeldOutOptions,
    ModelOptions,
)
from moi_jax.parallel import hosts

from support.runs import records, refusal, small_config, train_here

QUESTIONS = [
    {"question": f"Ann has {n} apples and buys 2. How many has she?", "answer": f"#### {n + 2}"}
    for n in range(5)
]

CODE = ["--tasks", "humaneval", "--allow-code-execution", "--sandbox", "weak"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a run of two steps, and the data of a benchmark."""
    place = tmp_path_factory.mktemp("evaluate")
    (place / "data" / "gsm8k").mkdir(parents=True)
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (place / "data" / "gsm8k" / "test.jsonl").write_text(lines)
    benchmarks = {"tasks": ["gsm8k"], "data": str(place / "data"), "limit": 2, "max_new_tokens": 8}
    config = small_config(
        place,
        train={"steps": 2, "global_batch_rows": 2},
        checkpoint={"every": 2},
        eval={"every": 0, "benchmarks": benchmarks},
    )
    train_here(config)
    return place


def run(place, monkeypatch, *arguments):
    words = ["evaluate", "run", "--data", "data", "--mesh", "tensor=1", *arguments]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.chdir(place)
    return evaluate.main()


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_training_scores_a_slice_of_the_benchmark_before_and_after(place):
    scored = [r for r in records(place / "run" / "metrics.jsonl") if "eval/gsm8k/score" in r]
    assert [record["step"] for record in scored] == [0, 2]
    assert "Benchmarks by step" in (place / "run" / "report.html").read_text()


def test_a_task_of_training_that_is_not_there_is_named(place):
    config = small_config(place, eval={"benchmarks": {"tasks": ["gsm9k"]}},
                          logging={"run_dir": str(place / "other"), "trackers": []})  # fmt: skip
    assert "no benchmark 'gsm9k'; choose among gsm8k, math" in refusal(config)
    assert not (place / "other" / "checkpoints").exists()


def test_a_benchmark_goes_to_a_directory_named_after_the_run(place, monkeypatch):
    assert run(place, monkeypatch, "--tasks", "gsm8k", "--max-new-tokens", "8") == 0
    found = results(place / "runs" / "evaluation" / "run-2")
    assert found["checkpoint"]["system_prompt"] == "You are a helpful assistant."
    assert found["tasks"]["gsm8k"]["items"] == 5
    assert not found["tasks"]["gsm8k"]["complete"]  # 5 of its 1,319 items
    assert "gsm8k" in (place / "runs" / "evaluation" / "run-2" / "report.html").read_text()


def test_held_out_crosses_the_prompts_with_a_benchmark_too(place, monkeypatch, capsys):
    out = place / "crossed"
    arguments = ["--tasks", "held_out", "--generate", "gsm8k", "--limit", "2"]
    assert run(place, monkeypatch, *arguments, "--max-new-tokens", "8", "--out", out) == 0
    assert (out / "held_out.json").exists()
    assert (out / "held_out.png").exists()
    prompts = {
        folder.name: results(folder)["checkpoint"]["system_prompt"]
        for folder in (out / "prompts").iterdir()
        if folder.is_dir()
    }
    assert prompts.pop("unrelated") not in prompts.values()
    assert prompts == {
        "default": "You are a helpful assistant.",
        "as_maths": "You are a mathematician.",
        "none": None,
    }
    assert "as_maths" in (out / "prompts" / "report.html").read_text()
    assert 'href="../prompt_items/gsm8k.html"' in (out / "prompts" / "report.html").read_text()
    items = (out / "prompt_items" / "gsm8k.html").read_text()
    assert 'href="../prompts/report.html#gsm8k"' in items


def test_a_task_keeps_its_own_files_under_each_crossed_prompt(place, monkeypatch, tmp_path):
    folder = tmp_path / "data" / "mt_bench"
    (folder / "reference_answer").mkdir(parents=True)
    (folder / "reference_answer" / "gpt-4.jsonl").write_text("")
    question = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}
    (folder / "question.jsonl").write_text(json.dumps(question) + "\n")
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    prompts = [{"name": n, "system_prompt": "", "prompt_template": "{question_1}"} for n in names]
    lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (folder / "judge_prompts.jsonl").write_text(lines)
    out = tmp_path / "out"
    arguments = ["--generate", "mt_bench", "--limit", "1", "--max-new-tokens", "2", "--out", out]
    assert run(place, monkeypatch, *arguments, "--data", tmp_path / "data") == 0
    written = sorted(path.relative_to(out) for path in out.rglob("model_answer/*.jsonl"))
    assert [str(path.parts[1]) for path in written] == ["as_maths", "default", "none", "unrelated"]
    assert not (out / "mt_bench").exists()


def test_results_of_another_prompt_are_told_before_anything_is_measured(
    place, monkeypatch, tmp_path
):
    arguments = ["--limit", "1", "--max-new-tokens", "4", "--out", tmp_path]
    assert run(place, monkeypatch, "--tasks", "gsm8k", *arguments) == 0
    with pytest.raises(UserError, match=r"holds results of another model or system prompt"):
        run(place, monkeypatch, "--tasks", "held_out,gsm8k", *arguments, "--system", "Hi.")
    assert not (tmp_path / "held_out.json").exists()
    # So are tasks of lm-evaluation-harness alone.
    opened = evaluation._Opened([], [], lm_eval_tasks=[None])
    monkeypatch.setattr(evaluation, "_open_tasks", lambda request: opened)
    with pytest.raises(UserError, match=r"holds results of another model or system prompt"):
        run(place, monkeypatch, "--lm-eval", "any", *arguments, "--system", "Hi.")


def test_the_limits_of_programs_are_written_into_the_results(place, monkeypatch, tmp_path):
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(row))
    out = tmp_path / "out"
    limits = ["--code-timeout", "7.5", "--code-packages", "numpy", "--max-new-tokens", "4"]
    assert run(place, monkeypatch, *CODE, *limits, "--data", tmp_path, "--out", out) == 0
    settings = results(out)["tasks"]["humaneval"]["settings"]
    told = {key: settings[key] for key in ("sandbox", "code_timeout_s", "code_memory_mib")}
    assert told == {"sandbox": "weak", "code_timeout_s": 7.5, "code_memory_mib": 512}
    assert settings["code_packages"] == [f"numpy {version('numpy')}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm9k"], r"no benchmark 'gsm9k'; choose among gsm8k, math, humaneval"),
        (["--tasks", "math"], r"nothing in .*math.*; put into the data directory"),
        (["--tasks", "humaneval"], r"--allow-code-execution"),
        (
            [*CODE, "--code-packages", "numpy,no_such_one"],
            r"--code-packages names no_such_one, which is not installed here",
        ),
        (["--tasks", " , "], r"there is nothing to do"),
        (["--tasks", "held_out", "--no-system"], r"held_out has system prompts of its own"),
        (["--tasks", "gsm8k", "--samples", "3"], r"--samples above 1 needs a --temperature"),
        (
            ["--tasks", "gsm8k", "--compare", "nowhere"],
            r"cannot read nowhere/results.json.*a directory of results",
        ),
        (["--tasks", "gsm8k", "--mesh", "tensor=99"], r"does not fit"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_written(
    place, monkeypatch, arguments, message, tmp_path
):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message) as told:
        run(place, monkeypatch, *arguments, "--out", out)
    assert "\n" not in str(told.value)
    assert not out.exists()


def test_held_out_losses_of_another_checkpoint_are_not_written_over(place, monkeypatch, tmp_path):
    (tmp_path / "held_out.json").write_text('{"parameters": "0123"}')
    with pytest.raises(UserError, match=r"held_out.json is of another checkpoint"):
        run(place, monkeypatch, "--out", tmp_path)


def test_data_that_moved_is_told_with_the_way_out(place, monkeypatch, tmp_path):
    config = tmp_path / "moved.yaml"
    moved = (place / "run" / "config.yaml").read_text().replace("data/samples", "data/nowhere")
    config.write_text(moved)
    with pytest.raises(UserError, match=r"run this where training ran, or give a config"):
        run(place, monkeypatch, "--config", config, "--out", tmp_path / "out")


def test_results_of_another_prompt_are_not_written_over(place, monkeypatch, tmp_path):
    arguments = ["--tasks", "gsm8k", "--limit", "1", "--max-new-tokens", "4", "--out", tmp_path]
    assert run(place, monkeypatch, *arguments) == 0
    before = results(tmp_path)
    with pytest.raises(UserError, match=r"holds results of another model or system prompt"):
        run(place, monkeypatch, *arguments, "--system", "You are a pirate.")
    assert results(tmp_path) == before


def test_a_directory_that_cannot_be_written_is_told_before_the_work(place, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*file/out: Not a directory"):
        run(place, monkeypatch, "--out", tmp_path / "file" / "out")


def test_an_evaluation_is_a_library_function(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    request = EvaluationRequest(
        Path("run"),
        BenchmarkOptions(place / "data", tmp_path, limit=1, max_new_tokens=4),
        ("held_out", "gsm8k"),
        model=ModelOptions(mesh="tensor=1", system_prompt="Hi."),
        held_out=HeldOutOptions(limit=1),
    )
    result = evaluate_checkpoint(request, jax.devices())
    assert result.directory == tmp_path
    assert json.loads(json.dumps(result.results)) == results(tmp_path)
    assert result.results["checkpoint"]["system_prompt"] == "Hi."
    assert result.held_out == json.loads((tmp_path / "held_out.json").read_text())
    assert result.report == tmp_path / "report.html"
    assert result.lm_eval is None


def test_the_harness_is_refused_on_many_hosts(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts, "joined", object)
    options = BenchmarkOptions(tmp_path, tmp_path / "out")
    request = EvaluationRequest(tmp_path, options, (), lm_eval_tasks=("any",))
    with pytest.raises(UserError, match=r"give --lm-eval to a command on one host"):
        evaluate_checkpoint(request, jax.devices())


def test_results_say_what_made_them(place, monkeypatch, tmp_path):
    arguments = ["--tasks", "gsm8k", "--limit", "2", "--max-new-tokens", "4", "--out", tmp_path]
    assert run(place, monkeypatch, *arguments) == 0
    made = results(tmp_path)["tasks"]["gsm8k"]["run"]
    assert made["command"] == shlex.join(["python", "-m", "moi_jax.evaluate", *sys.argv[1:]])
    assert made["versions"]["jax"] == jax.__version__
    assert made["commit"] is None or re.match(r"[0-9a-f]{40}", made["commit"])
    assert made["device"] == "1 x cpu (cpu)"
    data = (place / "data" / "gsm8k" / "test.jsonl").read_bytes()
    assert made["data"] == {"test.jsonl": hashlib.sha256(data).hexdigest()}
    # Anyone can find the digest of the parameters from exported safetensors.
    export_checkpoint(place / "run", tmp_path / "exported")
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    listed = "".join(
        f"{hashlib.sha256(tensors[name].tobytes()).hexdigest()}  {name}\n"
        for name in sorted(tensors)
    )
    assert made["values"] == hashlib.sha256(listed.encode()).hexdigest()
    page = (tmp_path / "report.html").read_text()
    assert made["values"] in page
    assert "2 of 5 items, evenly spaced" in page


def test_a_password_in_the_address_of_a_judge_is_not_kept(place, monkeypatch, tmp_path):
    url = "http://me:secret@localhost:1/v1"
    arguments = ["--tasks", "gsm8k", "--limit", "1", "--max-new-tokens", "2", "--out", tmp_path]
    assert run(place, monkeypatch, *arguments, "--judge-url", url) == 0
    command = results(tmp_path)["tasks"]["gsm8k"]["run"]["command"]
    assert command.endswith("--judge-url http://localhost:1/v1")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--judge-url", "http://me:p'w@host/v1"], "--judge-url http://host/v1"),
        (["--judge-url=http://me:p w@host/v1"], "--judge-url=http://host/v1"),
        (["--judge-url", "https://h/v1?api_key=secret"], "--judge-url https://h/v1"),
        (["--judge-u", "https://me@h/v1?k='a b'#c"], "--judge-u https://h/v1"),
    ],
)
def test_no_secret_of_a_judge_is_in_the_command(monkeypatch, words, shown):
    monkeypatch.setattr(sys, "argv", ["evaluate", "run", "--system", "it's", *words])
    command = evaluate._command(evaluate._parser().parse_args())
    quoted = shlex.quote("it's")
    assert command == f"python -m moi_jax.evaluate run --system {quoted} {shown}"


def test_the_protocol_is_printed_and_nothing_is_run(place, monkeypatch, tmp_path, capsys):
    """It is what the results say afterwards, but for what only the run knows."""
    arguments = ["--tasks", "gsm8k", "--limit", "2", "--max-new-tokens", "4", "--out", tmp_path]
    assert run(place, monkeypatch, *arguments, "--print-protocol") == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert run(place, monkeypatch, *arguments) == 0
    model, task, intervals = printed.strip().split("\n\n")
    assert task == results(tmp_path)["tasks"]["gsm8k"]["protocol"]
    for words in (
        "run-2 was evaluated in float32",
        "chat template chatml",
        'under the system prompt "You are a helpful assistant."',
    ):
        assert words in model
    for words in (
        "gsm8k: 2 of 5 items, evenly spaced",
        "One greedy answer to each, at most 4 new tokens",
        "without worked examples",
        "its last number equals the gold one",
    ):
        assert words in task
    assert "Clopper and Pearson" in task
    assert "95 % intervals are percentile bootstraps" in intervals


def test_the_protocol_tells_everything_that_would_run(place, monkeypatch, tmp_path, capsys):
    """Held-out losses run by default, and benchmarks under each prompt and lm-eval tasks may."""

    def printed(*arguments):
        assert run(place, monkeypatch, *arguments, "--out", tmp_path, "--print-protocol") == 0
        return capsys.readouterr().out.strip().split("\n\n")

    model, held_out = printed()
    assert "under the system prompt" not in model  # it has prompts of its own
    assert held_out.startswith("held_out: ")
    _, held_out, crossed, intervals = printed("--generate", "gsm8k", "--limit", "2")
    assert held_out.startswith("held_out: ")
    assert crossed.startswith(
        "Under each of 4 system prompts (default, as maths, unrelated, none), gsm8k: 2 of 5 items"
    )
    assert "95 % intervals" in intervals
    monkeypatch.setattr(
        evaluation, "_open_tasks", lambda request: evaluation._Opened([], [], lm_eval_tasks=[None])
    )
    monkeypatch.setattr(evaluation, "describe_lm_eval", lambda names, options: f"lm-eval {names}")
    model, harness = printed("--lm-eval", "piqa,arc_easy")
    assert "under the system prompt" in model
    assert harness == "lm-eval ('piqa', 'arc_easy')"


def test_losses_and_likelihoods_need_the_stacked_layers(place, monkeypatch, tmp_path):
    """Everything else holds the weights once: the sampler uses them layer by layer."""
    opened = []
    open_checkpoint = evaluation.open_checkpoint

    def watched(*given, **options):
        opened.append(options["by_layer"])
        return open_checkpoint(*given, **options)

    monkeypatch.setattr(evaluation, "open_checkpoint", watched)
    arguments = ["--limit", "1", "--max-new-tokens", "2"]
    run(place, monkeypatch, "--tasks", "gsm8k", *arguments, "--out", tmp_path / "a")
    run(place, monkeypatch, "--tasks", "held_out,gsm8k", *arguments, "--out", tmp_path / "b")
    assert opened == [True, False]
    before, after = (results(tmp_path / name)["tasks"]["gsm8k"] for name in "ab")
    assert before["score"] == after["score"]
    assert (tmp_path / "a" / "samples" / "gsm8k.jsonl").read_text() == (
        tmp_path / "b" / "samples" / "gsm8k.jsonl"
    ).read_text()
