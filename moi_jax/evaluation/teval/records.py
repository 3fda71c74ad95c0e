"""Finds the files of T-Eval and makes an item of each of their records."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.evaluation.protocol import Item
from moi_jax.evaluation.tasks.data_files import check_texts
from moi_jax.evaluation.teval.native import CALLING, native_chat
from moi_jax.evaluation.teval.parsing import load_lenient
from moi_jax.evaluation.teval.plan import FINISH
from moi_jax.evaluation.teval.scoring import LETTERS, Variant, read_plan
from moi_jax.text.conversations import Message

Json = dict[str, Any]

FILE_NAME = re.compile(
    r"(?P<tasks>instruct|plan|reason|retrieve|understand|review|reason_retrieve_understand|rru)"
    r"(_(?P<form>json|str))?(_(?P<zh>zh))?_(?P<version>v[12])(_(?P<zh_last>zh))?"
)
# The marks around thought, action and args in a template of a plain-text answer.
MARKS = ("thought_start", "thought_end", "action_start", "action_end", "args_start", "args_end")
FORMS = {"json": "json", "str": "str", "string": "str"}


@dataclass(frozen=True, slots=True)
class SubtaskFile:
    """A file of records. `form` is "" where each record names its own form (instruct)."""

    path: Path
    tasks: str
    form: str
    language: str
    version: str


def find_files(directory: Path) -> list[SubtaskFile]:
    """Finds subtask files by name. Other files, such as api_descrip.json, are ignored.

    Raises:
      UserError: there are none, or there are two of the same subtask.
    """
    found: dict[tuple[str, ...], SubtaskFile] = {}
    for path in sorted(directory.glob("*.json")):
        name = FILE_NAME.fullmatch(path.stem)
        if not name or not (name["form"] or name["tasks"] == "instruct"):
            continue
        tasks = name["tasks"].replace("rru", "reason_retrieve_understand")
        language = name["zh"] or name["zh_last"] or ""
        file = SubtaskFile(path, tasks, name["form"] or "", language, name["version"])
        for form in [file.form] if file.form else ["json", "str"]:
            other = found.setdefault((tasks, form, language), file)
            if other is not file:
                raise UserError(
                    f"{other.path} and {path.name} are two versions of the same subtask; "
                    f"keep one of them"
                )
    if not found:
        raise UserError(
            f"{directory} has no file of T-Eval; put its subtask files there, such as "
            f"plan_json_v1.json and review_str_v1.json, or use another data directory"
        )
    return list(dict.fromkeys(found.values()))


def load_file(file: SubtaskFile, system: str, tools: Mapping[str, str] | None = None) -> list[Item]:
    """Makes an item of each record.

    Args:
      system: where the system text of a record goes, see BenchmarkOptions.teval_system.
      tools: all documented ones by name, for calls in native form; None is the published form.

    Raises:
      UserError: a record is malformed. The message names file and record.
    """
    try:
        records = json.loads(file.path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file.path}: {error}") from None
    if not isinstance(records, dict):
        raise UserError(f"{file.path} is not a JSON object of key -> record")
    items = []
    for key, fields in records.items():
        record = _Record(f"{file.path}: record {key!a}", fields)
        check_texts(record.where, {key: fields})
        variant = Variant(file.tasks, file.form or _own_form(record), file.language)
        native = tools if variant.tasks in CALLING else None
        messages, offered = _chat(record, system, native)
        items.append(
            Item(
                f"{file.path.stem}/{key}",
                messages,
                _gold(record, variant),
                group=variant.name,
                system_block=native is not None or system != "as_user",
                tools=offered,
            )
        )
    return items


def _chat(
    record: "_Record", system: str, tools: Mapping[str, str] | None
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation of a record and the tools that it offers, which are none as published."""
    turns = _turns(record)
    if tools is None:
        return _render(turns, system, record), ()
    try:
        return native_chat(turns, tools)
    except ValueError as error:
        raise record.error(str(error)) from None


class _Record:
    """The fields of a record, and their place for error messages."""

    def __init__(self, where: str, fields: Any):
        self.where = where
        self.fields = fields

    def take(self, *path: str, kind: type | tuple[type, ...]) -> Any:
        """The value at a path of keys; raises UserError unless it exists and has this type."""
        value = self.fields
        for key in path:
            if not isinstance(value, dict) or key not in value:
                raise self.error(f"{'.'.join(path)} is missing")
            value = value[key]
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(each.__name__ for each in kinds)
            raise self.error(f"{'.'.join(path)} is not a {names}")
        return value

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {problem}")


def _own_form(record: _Record) -> str:
    form = record.take("meta_data", "response_format", kind=str)
    if form not in FORMS:
        raise record.error(f"meta_data.response_format is {form!r}, but must be json or string")
    return FORMS[form]


def _turns(record: _Record) -> list[tuple[str, str]]:
    turns = []
    for number, turn in enumerate(record.take("origin_prompt", kind=list)):
        role, content = (
            turn.get(key) if isinstance(turn, dict) else None for key in ("role", "content")
        )
        if role not in ("system", "user", "assistant", "function") or not isinstance(content, str):
            raise record.error(
                f"origin_prompt[{number}] must have a known role and a text as content"
            )
        turns.append((role, content))
    return turns


def _render(turns: Sequence[tuple[str, str]], system: str, record: _Record) -> tuple[Message, ...]:
    """The turns as a chat. Turns of other roles become the user's; neighbours are merged.

    The system text at the head is part of the user's turn, unless `system` is as_system. In the
    first release of the data, later system turns are results of functions.
    """
    merged: list[Message] = []
    for role, content in turns:
        if role == "system" and system == "as_system" and all(m.role == role for m in merged):
            now = Message("system", content)
        else:
            now = Message("assistant" if role == "assistant" else "user", content)
        if merged and merged[-1].role == now.role:
            now = Message(now.role, f"{merged.pop().content}\n{now.content}")
        merged.append(now)
    if not merged or merged[-1].role != "user":
        raise record.error("origin_prompt must end with a turn that the model can answer")
    return tuple(merged)


def _gold(record: _Record, variant: Variant) -> Json:
    """The gold value for scoring.score_answer."""
    if variant.tasks == "instruct":
        return _instruct_gold(record, variant.form)
    if variant.tasks == "plan":
        return _plan_gold(record, variant.form)
    if variant.tasks == "review":
        answer = record.take("ground_truth", "answer", kind=str)
        if answer not in LETTERS:
            raise record.error(
                f"ground_truth.answer is {answer!r}, but must be one of {', '.join(LETTERS)}"
            )
        return {"answer": answer}
    return _step_gold(record, variant)


def _instruct_gold(record: _Record, form: str) -> Json:
    keys = ("thought", "action", "args") if form == "json" else MARKS
    return {
        "template": {key: record.take("template", key, kind=str) for key in keys},
        "action": record.take("ground_truth", "action", kind=str),
        "args": record.take("ground_truth", "args", kind=dict),
    }


def _plan_gold(record: _Record, form: str) -> Json:
    plan = record.take("ground_truth", kind=(list, str))
    steps = read_plan(load_lenient(plan, "[", "]") if isinstance(plan, str) else plan)
    if not [step for step in steps if step.name != FINISH]:
        raise record.error("ground_truth must be a plan: a list of steps with id, name and args")
    gold: Json = {"steps": [{"name": step.name, "args": step.args} for step in steps]}
    if form == "str":
        gold["apis"] = record.take("meta", "API_list", kind=list)
        if not all(isinstance(name, str) and name for name in gold["apis"]):
            raise record.error("meta.API_list must be a list of names")
    return gold


def _step_gold(record: _Record, variant: Variant) -> Json:
    """Those of thought, name and args that the subtasks need."""
    truth = record.take("ground_truth", kind=(dict, str))
    if isinstance(truth, str):
        record = _Record(record.where, {"ground_truth": load_lenient(truth, "{", "}")})
    gold: Json = {}
    for subtask in variant.subtasks:
        if subtask != "understand":
            key = {"reason": "thought", "retrieve": "name"}[subtask]
            gold[key] = record.take("ground_truth", key, kind=str)
        elif variant.form == "json":
            args = record.take("ground_truth", "args", kind=object)
            gold["args"] = args if isinstance(args, dict) else {}
        else:
            gold["args"] = str(record.take("ground_truth", "args", kind=object))
    return gold
