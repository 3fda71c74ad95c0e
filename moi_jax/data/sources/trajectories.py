"""Trajectories: recognises answers that stand in their row as ReAct text, by their structure.

    user       ... Action: the tool to use, one of [weather] ...
    assistant  Thought: I need the weather.
               Action: weather
               Action Input: {"city": "Oslo"}
               Observation: -3 °C, snow
               Thought: I now know the final answer.
               Final Answer: It snows in Oslo.

An answer that only explains this form, or quotes it, is none.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from moi_jax.text.conversations import Message
from moi_jax.text.rendering import FINAL_ANSWER

# How a prompt in ReAct form declares its tools.
DECLARED = re.compile(r"^Action:.*?\[(.+?)\]", re.MULTILINE)
KEYWORD = re.compile(r"^(Thought|Action|Action Input|Observation):(.*)", re.MULTILINE)
# The keywords before the final answer, each as a letter. An observation may hold lines that begin
# like an input or an observation, and the last call may have no observation.
LETTERS = {"Thought": "T", "Action": "A", "Action Input": "I", "Observation": "O"}
STEPS = re.compile(r"(T*AIO[IO]*)+T*(AI)?")


def mark(messages: Sequence[Message]) -> list[Message]:
    """The messages, with `trajectory` set on each answer that is one.

    An answer is a trajectory if an earlier system or user turn declares tools in ReAct form, if it
    begins with a thought or an action (or goes on with the thought that the question ends with),
    if its lines follow one another as in this form, and if each action is a declared tool.
    """
    marked: list[Message] = []
    tools: set[str] = set()
    for message in messages:
        if message.role != "assistant":
            tools |= _declared(message.content)
        elif tools and "\nObservation:" in message.content:
            question = marked[-1].content if marked else ""
            begun = "Thought:" if question.rstrip().endswith("\nThought:") else ""
            if _is_trajectory(begun + message.content, tools):
                message = replace(message, trajectory=True)
        marked.append(message)
    return marked


def _declared(text: str) -> set[str]:
    lists = DECLARED.findall(text) if "Action:" in text else []
    return {name.strip(" \"'`") for names in lists for name in names.split(",")}


def _is_trajectory(text: str, tools: set[str]) -> bool:
    steps = text.lstrip().partition(FINAL_ANSWER)[0]
    lines = KEYWORD.findall(steps)
    actions = {rest.strip() for keyword, rest in lines if keyword == "Action"}
    letters = "".join(LETTERS[keyword] for keyword, _ in lines)
    begins = steps.startswith(("Thought:", "Action:"))
    return begins and actions <= tools and STEPS.fullmatch(letters) is not None
