"""MT-Bench: 80 questions of two turns. A judge model rates each answer from 1 to 10.

Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685);
single-answer grading and the layout of the files follow lm-sys/FastChat, fastchat/llm_judge.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import UserError, cannot_write
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Json, Response, Score, Task
from moi_jax.evaluation.tasks.data_files import json_rows, missing
from moi_jax.evaluation.tasks.judgments import MISSING, JudgeRequest, judgments_path
from moi_jax.evaluation.tasks.llm_judge import TRIES, make_judge
from moi_jax.text.conversations import Message

QUESTIONS = 80
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")
# The names of the judge's prompts by turn: without and with a reference answer.
PROMPTS = {
    1: ("single-v1", "single-math-v1"),
    2: ("single-v1-multi-turn", "single-math-v1-multi-turn"),
}
REFERENCES = "reference_answer/gpt-4.jsonl"


class MTBench(Task):
    """Without a judge, the answers are written to files and can be rated later."""

    name = "mt_bench"
    files = (
        f"mt_bench/question.jsonl, mt_bench/judge_prompts.jsonl and mt_bench/{REFERENCES}, all "
        "from lm-sys/FastChat, fastchat/llm_judge/data"
    )
    scoring = "A judge rates both answers from 1 to 10; the score is ten times the mean rating"
    rated = True
    turns = len(PROMPTS)
    own_temperature = "at the temperature of its category (0 to 0.7)"
    max_new_tokens = 1024
    published_sizes = (QUESTIONS,)

    def __init__(self, options: BenchmarkOptions):
        super().__init__(options)
        if options.samples > 1:
            raise UserError("MT-Bench rates one answer to each question; use --samples 1")
        self.judge = make_judge(options)
        if self.judge is None:
            self.scoring = "No judge rates the answers, so there is no score"
        self._data = options.data / "mt_bench"
        self._out = options.out / "mt_bench"
        self._prompts: dict[str, Json] = {}
        self._versions: set[str] = set()
        self._missing = 0  # ratings

    def load(self) -> list[Item]:
        self._prompts = self._read_prompts()
        references = self._read_references()
        items = []
        for where, row in self._rows("question.jsonl"):
            match row:
                case {
                    "question_id": int(question),
                    "category": str(category),
                    "turns": [str(first), str(second)],
                } if category in TEMPERATURES:
                    pass
                case _:
                    raise UserError(
                        f"{where}: a question must have question_id (a number), turns (two texts) "
                        f"and category (one of {', '.join(TEMPERATURES)})"
                    )
            reference = references.get(question) if category in WITH_REFERENCE else None
            if category in WITH_REFERENCE and reference is None:
                raise UserError(
                    f"{where}: question {question} of {category} is judged with a reference, "
                    f"but {self._data / REFERENCES} has none for it"
                )
            items.append(
                Item(
                    id=str(question),
                    messages=(Message("user", first),),
                    gold={"question_id": question, "reference": reference},
                    follow_ups=(second,),
                    group=category,
                    temperature=TEMPERATURES[category],
                )
            )
        return items

    def score(self, responses: Iterable[tuple[Item, Response]]) -> Iterator[Score]:
        """Writes all answers, then yields the scores as the judge's ratings arrive.

        Raises:
          UserError: see `Judge.rate`.
        """
        pairs = [(item, _two_turns(response)) for item, response in responses]
        self._write_answers(pairs)
        self._versions, self._missing = set(), 0
        if self.judge is None:
            yield from (Score({}) for _ in pairs)
            return
        requests = [
            self._judge_request(item, turns, turn) for item, turns in pairs for turn in PROMPTS
        ]
        path = judgments_path(self.options.out, self.judge.model)
        records = self.judge.rate(requests, self._model, path)
        for both in zip(records, records, strict=True):  # the two turns of an item
            self._versions.update(record["judge_version"] for record in both)
            ratings = {
                f"rating_{record['turn']}": float(record["score"])
                for record in both
                if record["score"] != MISSING
            }
            self._missing += len(both) - len(ratings)
            yield Score(
                ratings,
                failure="no rating" if len(ratings) < len(both) else None,
                details={"judgments": [record["judgment"] for record in both]},
            )

    def weights(self, counts: Mapping[str, int]) -> dict[str, float] | None:
        """Every rating has the same weight, whatever its turn. A rating of 10 is a score of 100."""
        ratings = sum(counts.values())
        return {name: n / ratings / 10 for name, n in counts.items()} if ratings else None

    def settings(self) -> Json:
        """The settings. The judge's version is known only after scoring."""
        if self.judge is None:
            return {"judge": None}
        return {
            "judge": self.judge.model,
            "judge_version": ", ".join(sorted(self._versions)),
            "judge_url": self.judge.shown_url,
            "judge_prompts": _hash(self._prompts),
        }

    def notes(self, items: Sequence[Item], scores: Sequence[Score]) -> list[str]:
        notes = []
        if len(items) < QUESTIONS:
            notes.append(f"{len(items)} of the benchmark's {QUESTIONS} questions")
        if self.judge is None:
            answers = self._out / "model_answer" / f"{self._model}.jsonl"
            notes.append(f"not judged: run the same command with --judge to rate {answers}")
            return notes
        if self._missing:
            without = [item.id for item, score in zip(items, scores, strict=True) if score.failure]
            some = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
            notes.append(
                f"partial: {self._missing} of {2 * len(items)} ratings are missing, each after "
                f"{TRIES} tries (questions {some})"
            )
        if len(self._versions) > 1:
            notes.append(
                f"ratings of several versions of the judge: {', '.join(sorted(self._versions))}"
            )
        return notes

    def is_complete(self, items: Sequence[Item]) -> bool:
        """Whether all questions were run and all their ratings are there."""
        return super().is_complete(items) and not self._missing

    @property
    def _model(self) -> str:
        """The name of the model in the files: that of the directory of results."""
        return self.options.out.resolve().name

    def _judge_request(self, item: Item, answers: Sequence[str], turn: int) -> JudgeRequest:
        reference = item.gold["reference"]
        prompt = self._prompts[PROMPTS[turn][reference is not None]]
        fields = _fields((item.messages[-1].content, *item.follow_ups), answers, reference)
        user = prompt["prompt_template"].format(**fields)
        return JudgeRequest(
            item.gold["question_id"], turn, prompt["name"], prompt["system_prompt"], user
        )

    def _write_answers(self, pairs: Sequence[tuple[Item, tuple[str, str]]]) -> None:
        """Writes FastChat's files beside the judgments: questions, references, answers."""
        path = self._out / "model_answer" / f"{self._model}.jsonl"
        lines = [
            {
                "question_id": item.gold["question_id"],
                "answer_id": _hash([self._model, item.id, turns]),
                "model_id": self._model,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
            }
            for item, turns in pairs
        ]
        try:
            for name in ("question.jsonl", REFERENCES):
                (self._out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._data / name, self._out / name)
            path.parent.mkdir(exist_ok=True)
            atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise cannot_write(path, error) from None

    def _read_prompts(self) -> dict[str, Json]:
        """The four prompts of single-answer grading. Each is checked by filling it in."""
        rows = {row.get("name"): (where, row) for where, row in self._rows("judge_prompts.jsonl")}
        fields = _fields(("", ""), ("", ""), ("", ""))
        prompts = {}
        for name in (name for names in PROMPTS.values() for name in names):
            if name not in rows:
                raise UserError(f"{self._data / 'judge_prompts.jsonl'} has no prompt {name}")
            where, row = rows[name]
            try:
                row["system_prompt"] + row["prompt_template"].format(**fields)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise UserError(f"{where}: prompt {name} cannot be filled in: {error!r}") from None
            prompts[name] = {key: row[key] for key in ("name", "system_prompt", "prompt_template")}
        return prompts

    def _read_references(self) -> dict[int, tuple[str, str]]:
        references = {}
        for where, row in self._rows(REFERENCES):
            match row:
                case {
                    "question_id": int(question),
                    "choices": [{"turns": [str(first), str(second)]}, *_],
                }:
                    references[question] = (first, second)
                case _:
                    raise UserError(
                        f"{where}: an answer must have question_id and choices, and the first "
                        f"choice two turns"
                    )
        return references

    def _rows(self, name: str) -> Iterator[tuple[str, Json]]:
        """(place, row) of each row of a file of the benchmark."""
        path = self._data / name
        if not path.is_file():
            raise missing(self, path)
        return json_rows(path)


def _two_turns(response: Response) -> tuple[str, str]:
    """The answers of both turns. A turn that was not reached counts as empty."""
    first, second, *_ = *response.texts, "", ""
    return first, second


def _fields(
    questions: Sequence[str], answers: Sequence[str], references: Sequence[str] | None
) -> dict[str, str]:
    """The values of the fields in the prompts of both turns."""
    fields = {"question": questions[0], "answer": answers[0]}
    for turn in PROMPTS:
        fields[f"question_{turn}"] = questions[turn - 1]
        fields[f"answer_{turn}"] = answers[turn - 1]
        if references is not None:
            fields[f"ref_answer_{turn}"] = references[turn - 1]
    return fields


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
