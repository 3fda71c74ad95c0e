"""Scores an answer in each subtask of T-Eval, by the rules of its second version."""

import re
from dataclasses import dataclass
from typing import Any

from moi_jax.evaluation.protocol import Score
from moi_jax.evaluation.teval.embedder import Similarity
from moi_jax.evaluation.teval.parsing import as_text, between, clean, load_lenient, load_literal
from moi_jax.evaluation.teval.plan import FINISH, Step, compare_plans

Json = dict[str, Any]
# Values by "subtask/metric", whether the text could be parsed, and what was parsed.
Reading = tuple[dict[str, float], bool, Any]

# The metrics of each subtask. The score of a subtask is their mean.
SUBTASK_METRICS = {
    "instruct": ("format", "args"),
    "plan": ("f1",),
    "reason": ("thought",),
    "retrieve": ("name",),
    "understand": ("args",),
    "review": ("answer",),
}
NEED_EMBEDDER = ("plan", "reason")
LETTERS = ("A", "B", "C", "D", "E")


@dataclass(frozen=True, slots=True)
class Variant:
    """The kind of a record.

    Attributes:
      tasks: the subtasks that score one answer, joined by "_".
      form: the form of the answer, json or str (plain text).
      language: "" (English) or "zh".
    """

    tasks: str
    form: str
    language: str = ""

    @property
    def name(self) -> str:
        """For example "plan_json" or "reason_retrieve_understand_json_zh"."""
        return "_".join(part for part in (self.tasks, self.form, self.language) if part)

    @property
    def subtasks(self) -> tuple[str, ...]:
        return tuple(self.tasks.split("_"))

    def metric(self, subtask: str, metric: str) -> str:
        """The full name of a metric, for example "plan_json/f1"."""
        return f"{Variant(subtask, self.form, self.language).name}/{metric}"

    @staticmethod
    def of(name: str) -> "Variant":
        language = "zh" if name.endswith("_zh") else ""
        tasks, form = name.removesuffix("_zh").rsplit("_", 1)
        return Variant(tasks, form, language)


def score_answer(
    variant: Variant, text: str, gold: Json, similarity: Similarity | None, *, compat: bool = False
) -> Score:
    """The score of one text.

    Args:
      gold: the gold value of the record, see records.py.
      similarity: None leaves out the metrics that need embeddings.
      compat: see compare_plans.
    """
    text = clean(text)
    match variant.tasks:
        case "instruct":
            reading = _instruct(variant.form, text, gold)
        case "plan":
            reading = _plan(variant.form, text, gold, similarity, compat)
        case "review":
            reading = _review(text, gold)
        case _:
            reading = _step(variant, text, gold, similarity)
    values, parsed, found = reading
    metrics = {variant.metric(*key.split("/")): float(value) for key, value in values.items()}
    failure = "no answer" if not text else None if parsed else "not parsed"
    return Score(metrics, failure, {"parsed": found})


def _instruct(form: str, text: str, gold: Json) -> Reading:
    answer = (_keyed if form == "json" else _marked)(text, gold["template"])
    if answer is None:
        return {"instruct/format": 0, "instruct/args": 0}, False, None
    action, args = answer
    # As upstream, a missing argument counts as an empty one.
    right = sum(args.get(key, "") == value for key, value in gold["args"].items())
    share = ((action == gold["action"]) + right) / (len(gold["args"]) + 1)
    found = {"action": as_text(action), "args": as_text(args)}
    return {"instruct/format": 1, "instruct/args": share}, True, found


def _keyed(text: str, template: dict[str, str]) -> tuple[Any, Json] | None:
    """Action and arguments of a JSON object whose keys are named by the template."""
    loaded = load_lenient(text)
    if not isinstance(loaded, dict) or not set(template.values()) <= loaded.keys():
        return None
    return loaded[template["action"]], _dict_or_empty(loaded[template["args"]])


def _marked(text: str, template: dict[str, str]) -> tuple[str, Json] | None:
    """Action and arguments between the marks of the template."""
    marks = (
        template["thought_start"].lstrip(),  # `clean` has stripped the answer
        template["thought_end"] + template["action_start"],
        template["action_end"] + template["args_start"],
        template["args_end"].rstrip(),
    )
    parts = between(text, marks)
    if parts is None:
        return None
    try:
        args = load_literal(parts[2].strip())
    except ValueError:
        args = {}
    return parts[1].strip(), _dict_or_empty(args)


def _plan(form: str, text: str, gold: Json, similarity: Similarity | None, compat: bool) -> Reading:
    if form == "json":
        steps = read_plan(load_lenient(text, "[", "]"))
    else:
        steps = steps_in_words(text, gold["apis"])
    found = [{"name": step.name, "args": step.args} for step in steps]
    if similarity is None:
        return {}, bool(steps), found
    values = compare_plans(
        steps, [Step(**step) for step in gold["steps"]], similarity, compat=compat
    )
    return {f"plan/{name}": value for name, value in values.items()}, bool(steps), found


def read_plan(loaded: Any) -> list[Step]:
    """The steps in the order of their ids; [] where a step lacks id, name or args."""
    if not isinstance(loaded, list):
        return []
    try:
        ordered = sorted(loaded, key=lambda step: int(step["id"]))
        return [Step(as_text(step["name"]), as_text(step["args"])) for step in ordered]
    except (KeyError, TypeError, ValueError, OverflowError):
        return []


def steps_in_words(text: str, apis: list[str]) -> list[Step]:
    """A step for each sentence that names an API: the first API, with the sentence as args."""
    steps = []
    for sentence in text.replace(". ", "\n").split("\n"):
        named = [(sentence.find(name), n) for n, name in enumerate(apis) if name in sentence]
        if named:
            steps.append(Step(apis[min(named)[1]], as_text(sentence)))
    return steps


def _step(variant: Variant, text: str, gold: Json, similarity: Similarity | None) -> Reading:
    """Scores those of thought, name and args of one call that the subtasks need."""
    if variant.form == "json":
        loaded = load_lenient(text, "{", "}")
        parsed = isinstance(loaded, dict)
        answer = loaded if parsed else {}
    else:
        parsed = bool(text)
        answer = {"thought": text, "name": text, "args": text}
    thought, name = (as_text(answer.get(key, "")) for key in ("thought", "name"))
    values: dict[str, float] = {}
    if "thought" in gold and similarity is not None:
        # An empty thought scores 0, whatever the embedding of an empty text is.
        values["reason/thought"] = similarity([thought], [gold["thought"]])[0, 0] if thought else 0
    if "name" in gold:
        same = name == gold["name"] if variant.form == "json" else _names(name, gold["name"])
        values["retrieve/name"] = same
    if "args" in gold:
        values["understand/args"] = parsed and _args_share(answer.get("args"), gold["args"])
    return values, parsed, {key: as_text(value) for key, value in answer.items() if key in gold}


def _names(text: str, gold: str) -> bool:
    """Whether the text has this name and no name of another API."""
    return gold in text and set(re.findall(rf"\w+\.\w+|{FINISH}", text)) <= {gold}


def _args_share(answer: Any, gold: Any) -> float:
    """The share of the gold arguments whose texts are equal."""
    if isinstance(gold, str):
        return float(_unquoted(as_text(answer)) == _unquoted(gold))
    answer = _dict_or_empty(answer)
    if not gold:
        return float(not answer)
    right = sum(key in answer and as_text(answer[key]) == as_text(gold[key]) for key in gold)
    return right / len(gold)


def _review(text: str, gold: Json) -> Reading:
    letter = text[text.find(":") + 1 :].strip()[:1]
    known = letter in LETTERS
    return {"review/answer": letter == gold["answer"]}, known, letter if known else None


def _dict_or_empty(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _unquoted(text: str) -> str:
    return text.strip("'").strip('"')
