"""Trajectories: recognises answers that stand in their row as ReAct text, by their structure.

    user       ... Action: the tool to use, one of [weather] ...
    assistant  Thought: I need the weather.
               Action: weather
               Action Input: {"city": "Oslo"}
               Observation: -3 °C, snow
               Thought: I now know the final answer.
               Final Answer: It snows in Oslo.

An answer that only explains this form, or quotes it, is none. An answer that is not recognised
carries loss as a whole, so the user is told of one that may be a trajectory (`unrecognised`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from reprlib import repr as shown  # the name of an action may be of any length

from moi_jax.text.conversations import Message
from moi_jax.text.instructions import FINAL_ANSWER

# How a prompt in ReAct form declares its tools.
DECLARED = re.compile(r"^Action:.*?\[(.+?)\]", re.MULTILINE)
PARAMETERS = re.compile(r"\(.*?\)")  # after the name of a tool: [weather (city), joke]
KEYWORD = re.compile(r"^(Thought|Action|Action Input|Observation):(.*)", re.MULTILINE)
# The keywords before the final answer, each as a letter. An observation may hold lines that begin
# like an input or an observation, and the last call may have no observation.
LETTERS = {"Thought": "T", "Action": "A", "Action Input": "I", "Observation": "O"}
STEPS = re.compile(r"(T*AIO[IO]*)+T*(AI)?")


def mark(messages: Sequence[Message]) -> list[Message]:
    """The messages, with `trajectory` set on each answer that is one.

    An answer is a trajectory if an earlier system or user turn declares tools in ReAct form, if its
    lines follow one another as in this form, and if each action is a declared tool. It may begin
    with other text; but text that ends with a colon introduces an example.
    """
    marked = list(messages)
    for turn, fault in _checked(messages):
        if not fault:
            marked[turn] = replace(messages[turn], trajectory=True)
    return marked


def unrecognised(messages: Sequence[Message]) -> str:
    """Why an answer with the lines of a trajectory is not marked as one; "" if none is like that.

    Only answers that carry loss count, after a turn that declares tools.
    """
    for turn, fault in _checked(messages):
        message = messages[turn]
        if message.train and not message.trajectory and "\nAction Input:" in message.content:
            return fault
    return ""


def _checked(messages: Sequence[Message]) -> Iterator[tuple[int, str]]:
    """(turn, why it is no trajectory) of each answer with an observation, after declared tools."""
    tools: set[str] = set()
    question = ""
    for turn, message in enumerate(messages):
        if message.role in ("system", "user"):
            question = message.content
            tools |= _declared(question)
        elif message.role == "assistant" and tools and "\nObservation:" in message.content:
            begun = "Thought:" if question.rstrip().endswith("\nThought:") else ""
            yield turn, _fault(begun + message.content, tools)


def _declared(text: str) -> set[str]:
    lists = DECLARED.findall(text) if "Action:" in text else []
    named = ",".join(PARAMETERS.sub("", names) for names in lists)
    return {name.strip(" \"'`") for name in named.split(",") if name.strip()}


def _fault(text: str, tools: set[str]) -> str:
    """Why the text is no trajectory; "" if it is one."""
    steps = text.partition(FINAL_ANSWER)[0]
    before = KEYWORD.split(steps, maxsplit=1)[0]
    lines = KEYWORD.findall(steps)
    actions = [rest.strip() for keyword, rest in lines if keyword == "Action"]
    letters = "".join(LETTERS[keyword] for keyword, _ in lines)
    if before.rstrip().endswith(":"):
        return "the text before the first step ends with a colon"
    if unknown := [action for action in actions if action not in tools]:
        return f"the action {shown(unknown[0])} is not a declared tool"
    if not STEPS.fullmatch(letters):
        return "the lines do not follow one another as Thought, Action, Action Input, Observation"
    return ""
