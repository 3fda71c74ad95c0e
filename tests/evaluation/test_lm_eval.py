"""lm-evaluation-harness on our checkpoints, against its own Hugging Face backend."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.opener import open_checkpoint
from moi_jax.common.errors import UserError
from moi_jax.evaluation.harness import run as lm_eval_run
from moi_jax.evaluation.harness.adapter import CheckpointLM
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.sampling.chat_model import make_chat_model
from moi_jax.sampling.likelihood import Likelihood
from moi_jax.sampling.requests import Completion
from moi_jax.text.tokenizer import load_tokenizer

from support.runs import SAMPLES
from support.tool_templates import TEMPLATES

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM

CONTEXT = 192
SYSTEM = "You are brief."
QUESTIONS = ("What is 2 + 2?", "Name a  fruit.\n", " def f(x):\n\treturn", "Grüße, 世界?")
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["four", "an apple or a pear", "x", "four and more"],
        "doc_to_target": 0,
        "num_fewshot": 1,
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nA. one\nB. two\nAnswer:",
        "doc_to_choice": ["A", "B"],
        "doc_to_target": 1,
    },
    "answers": {
        "output_type": "generate_until",
        "description": "Answer the question.\n",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "4",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "begun": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "4",
        "gen_prefix": "The answer is",
        "generation_kwargs": {"max_gen_toks": 12, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama by transformers, our checkpoint of it, its export, and tasks with data."""
    folder = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        eos_token_id=2047, bos_token_id=None, pad_token_id=2045,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    shutil.copytree(SAMPLES / "tokenizer", folder / "Llama")
    model.save_pretrained(folder / "Llama")
    settings = folder / "Llama" / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    default = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    values["chat_template"] = (
        "{% if messages[0]['role'] != 'system' %}{{ " + repr(default) + " }}{% endif %}"
        + values["chat_template"]
    )  # fmt: skip
    settings.write_text(json.dumps(values))
    import_checkpoint(folder / "Llama", folder / "ckpt")
    export_checkpoint(folder / "ckpt", folder / "exported")
    (folder / "tasks").mkdir()
    words = " ".join(f"{n} {question}" for n, question in enumerate(QUESTIONS * 30))
    rows = [
        {"question": question, "text": words[: 37 * 9**n]} for n, question in enumerate(QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder)}
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "test",
        }
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(common | task))
    return folder


@pytest.fixture(scope="module")
def chat_model(folder):
    checkpoint = open_checkpoint(folder / "ckpt", mesh="data=1", devices=jax.devices())
    assert checkpoint.prompts["default_system_prompt"] == SYSTEM
    make_chat = make_chat_model(
        checkpoint.bind, checkpoint.config, checkpoint.tokenizer, SYSTEM, slots=4
    )
    return make_chat(checkpoint.parameters)


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "exported")
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")


@pytest.fixture
def own_tasks(monkeypatch):
    """Only the tasks of the folder: it takes seconds to find the harness's 14,000."""
    manager = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_run, "TaskManager", manager)


def evaluated(lm, folder, chat):
    """Task -> what the model said to each of its items, and the results."""
    manager = TaskManager(include_path=folder / "tasks", include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(TASKS),
        task_manager=manager,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    return results["samples"], results["results"]


@pytest.mark.parametrize("chat", [False, True])
def test_every_kind_of_task_gives_what_the_hugging_face_backend_gives(
    folder, chat_model, theirs, chat
):
    ours, our_results = evaluated(CheckpointLM(chat_model), folder, chat)
    expected, their_results = evaluated(theirs, folder, chat)
    texts = []
    for name, samples in expected.items():
        for mine, other in zip(ours[name], samples, strict=True):
            assert mine["arguments"] == other["arguments"]
            if TASKS[name]["output_type"] == "generate_until":
                assert mine["resps"] == other["resps"]
                texts.append(mine["resps"][0][0])
                continue
            for (mine_resp,), (other_resp,) in zip(mine["resps"], other["resps"], strict=True):
                np.testing.assert_allclose(
                    np.array(mine_resp, float), np.array(other_resp, float), rtol=1e-5, atol=1e-4
                )
    assert len({len(text) for text in texts}) > 2  # some ended by a string, some by their length
    for name, values in their_results.items():
        for metric, value in values.items():
            if not isinstance(value, str):
                assert our_results[name][metric] == pytest.approx(value, rel=1e-5), (name, metric)


@pytest.mark.parametrize("opening", [None, "<|endoftext|>"])
def test_text_becomes_the_tokens_of_the_hugging_face_backend(folder, tmp_path, opening, chat_model):
    """Also where the tokenizer opens every text with a token, as Llama 3's does."""
    for file in (folder / "exported").glob("*token*"):
        shutil.copy(file, tmp_path)
    if opening:
        path = tmp_path / "tokenizer.json"
        values = json.loads(path.read_text())
        values["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": opening, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {opening: {"id": opening, "ids": [2045], "tokens": [opening]}},
        }
        path.write_text(json.dumps(values))
        settings = tmp_path / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": opening}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    ours = CheckpointLM(dataclasses.replace(chat_model, tokenizer=load_tokenizer(tmp_path)))
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    chat = ours.apply_chat_template([{"role": "user", "content": "\n\nHello  "}])
    begun = "<|endoftext|>Some text<|im_end|>\n\n"
    for text in ("", "plain text", chat, f"{chat} answer", begun, "a<|im_start|>b<|im_"):
        assert ours.tok_encode(text) == theirs.tok_encode(text), text
        plain = ours.tok_encode(text, add_special_tokens=False)
        assert plain == theirs.tok_encode(text, add_special_tokens=False), text


def test_a_chat_is_written_by_the_checkpoints_own_template(folder, tmp_path, chat_model):
    for file in (folder / "exported").glob("*token*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["hermes"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    own = load_tokenizer(tmp_path)
    assert own.template.name == "from_checkpoint"
    ours = CheckpointLM(dataclasses.replace(chat_model, tokenizer=own, system_prompt=None))
    chat = [{"role": "system", "content": "Be <b>kind</b>."}]
    for question in QUESTIONS:
        chat.append({"role": "user", "content": question})
        text = ours.apply_chat_template(chat)
        assert text == theirs.apply_chat_template(chat)
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        chat.append({"role": "assistant", "content": "4"})


def test_a_run_writes_the_harness_files_and_goes_on_after_a_kill(
    folder, chat_model, tmp_path, own_tasks, log_text
):
    tasks = lm_eval_run.open_tasks(["letters", "answers"], folder / "tasks")
    options = BenchmarkOptions(data=tmp_path, out=tmp_path, limit=3, max_new_tokens=5)
    made_by = {"name": "tiny", "parameters": "abc"}
    model = Interrupted(chat_model, after=2)
    with pytest.raises(KeyboardInterrupt):
        lm_eval_run.run_lm_eval(tasks, model, made_by, options)
    tasks = lm_eval_run.open_tasks(["letters", "answers"], folder / "tasks")
    model = Interrupted(chat_model, after=99)
    results = lm_eval_run.run_lm_eval(tasks, model, made_by, options)
    assert model.asked == 1
    assert results["config"]["checkpoint"] == made_by
    printed = log_text.getvalue()
    assert "|letters|" in printed
    assert "exact_match" in printed
    (written,) = (tmp_path / "lm_eval" / "tiny").glob("results_*.json")
    stored = json.loads(written.read_text())
    assert stored["results"]["letters"]["acc,none"] == results["results"]["letters"]["acc,none"]
    assert stored["chat_template"].count("<|im_start|>")
    (samples,) = (tmp_path / "lm_eval" / "tiny").glob("samples_answers_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 3
    assert SYSTEM not in rows[0]["arguments"]["gen_args_0"]["arg_0"]  # the task's own stands there
    # Another model in the same directory is asked anew.
    tasks = lm_eval_run.open_tasks(["answers"], folder / "tasks")
    with pytest.raises(KeyboardInterrupt):
        lm_eval_run.run_lm_eval(
            tasks,
            Interrupted(chat_model, after=0),
            made_by | {"parameters": "def"},
            options,
        )


class Interrupted:
    """A chat model that is stopped after some answers, as by the user."""

    def __init__(self, model, after):
        self.asked, self._model, self._after = 0, model, after
        self.sampler = self

    def __getattr__(self, name):
        return getattr(self._model, name)

    def run(self, parameters, requests):
        for found in self._model.sampler.run(parameters, requests):
            if self.asked == self._after:
                raise KeyboardInterrupt
            self.asked += 1
            yield found


class Answers:
    """A chat model without a model: its sampler and its scorer say what they are told to."""

    context = 32

    def __init__(self, model, result):
        self.asked = []
        self._model, self._result = model, result
        self.sampler = self.scorer = self

    def __getattr__(self, name):
        return getattr(self._model, name)

    def run(self, parameters, requests):
        self.asked += requests
        return enumerate([self._result] * len(requests))


def asked(kind, *arguments):
    return [Instance(kind, {}, arguments, 0)]


def test_generation_options_reach_the_sampler(chat_model):
    model = Answers(chat_model, Completion((5,), "so", "stop"))
    lm = CheckpointLM(model, seed=3)
    options = {
        "until": "\n",
        "max_gen_toks": 8,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    text = "word " * 100
    requests = asked("generate_until", text, options) * 2
    assert lm.generate_until(requests) == ["so", "so"]
    first, second = model.asked
    assert first.prompt == lm.tok_encode(text)[-24:]  # the prompt gives way to the answer
    assert (first.temperature, first.top_p, first.max_new_tokens) == (0.7, 0.9, 8)
    assert first.stop_strings == ("\n",)
    assert first.seed != second.seed  # repeats are drawn anew
    greedy = asked("generate_until", "x", {"max_new_tokens": 4, "num_beams": 1, "temperature": 0})
    lm.generate_until(greedy)
    assert (model.asked[-1].temperature, model.asked[-1].max_new_tokens) == (0.0, 4)
    assert model.asked[-1].stop_strings == ()


def test_long_contexts_are_cut_on_the_left(chat_model):
    model = Answers(chat_model, Likelihood(-1.5, True))
    lm = CheckpointLM(model)
    text = "word " * 100
    assert lm.loglikelihood(asked("loglikelihood", text, " end")) == [(-1.5, True)]
    ((context, continuation),) = model.asked
    assert len(context) + len(continuation) == 33  # the last token is not read
    assert [*context, *continuation] == lm.tok_encode(f"{text} end")[-33:]


def test_what_follows_nothing_follows_the_prefix_token(chat_model):
    model = Answers(chat_model, Likelihood(-1.5, True))
    lm = CheckpointLM(model)
    lm.loglikelihood(asked("loglikelihood", "", "so") + asked("loglikelihood", "\n", "so"))
    assert model.asked == [
        ([lm.prefix_token_id], lm.tok_encode("so")),
        ([lm.prefix_token_id], lm.tok_encode("\nso")),
    ]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("generate_until", ("x", {"max_gen_toks": 32}), "answers of 32 tokens.*context has 32"),
        ("generate_until", ("x", {"num_beams": 4}), "num_beams=4.*does not support"),
        ("loglikelihood", ("x", "word " * 200), "likelihood of .* tokens.*context has 32"),
    ],
)
def test_what_cannot_be_asked_is_refused(chat_model, kind, arguments, message):
    lm = CheckpointLM(Answers(chat_model, None))
    with pytest.raises(UserError, match=message):
        getattr(lm, kind)(asked(kind, *arguments))


def test_logits_that_are_not_finite_end_the_run(chat_model):
    for kind, result, arguments in (
        ("generate_until", Completion((), "", "not_finite"), ("Why?", {})),
        ("loglikelihood", Likelihood(np.nan, False, "not_finite"), ("Why?", "so")),
        ("loglikelihood_rolling", Likelihood(np.nan, False, "not_finite"), ("Why?",)),
    ):
        model = Answers(chat_model, result)
        model.context = 300
        with pytest.raises(UserError, match=r"not finite \(NaN\)"):
            getattr(CheckpointLM(model), kind)(asked(kind, *arguments))


def test_a_task_that_is_not_there_or_cannot_run_is_told_in_a_line(folder, tmp_path, own_tasks):
    for file in (folder / "tasks").iterdir():
        shutil.copy(file, tmp_path)
    task = json.loads((tmp_path / "letters.yaml").read_text())
    missing = task | {"task": "missing"}
    missing["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}
    (tmp_path / "missing.yaml").write_text(json.dumps(missing))
    unsafe = task | {"task": "unsafe", "unsafe_code": True}
    (tmp_path / "unsafe.yaml").write_text(json.dumps(unsafe))
    for names, message in (
        (["letters", "leters"], "no task 'leters'; similar names are letters;"),
        (["zzz"], "no task 'zzz'; python -m lm_eval ls tasks"),
        (["missing"], "cannot load the task missing .*nowhere.jsonl.*HF_HOME"),
        (["unsafe"], "unsafe runs generated code without a sandbox"),
    ):
        with pytest.raises(UserError, match=message) as told:
            lm_eval_run.open_tasks(names, tmp_path)
        assert "\n" not in str(told.value)
