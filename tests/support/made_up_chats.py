"""Made-up conversations with all that a chat template may have to write.

Every text stands between two sentinels with its own number, which say in a rendered text whose part
is where: «u3 ... u3» is the text of message 3, by the user; t is a thought, c a call, r a result.
"""

import json
import random

from moi_jax.text.conversations import Conversation, Message, ToolCall

TEXTS = (
    "What is 2 + 2?",
    "It is 4.",
    "Grüße, 世界 \U0001f600",
    "今天奥斯陆的天气怎么样？\n请用摄氏度回答。",
    "def f(x):\n\treturn {{ x }} {% if %} <b>'\"\\</b>\n\n",
    "Thought: look\nAction: find",
    "a <tool> and a [INST], </s>, <|unknown|>",
    "1. one\n2. two\n\n   indented",
)
CITIES = ("Oslo", "世界", 'a "quoted" city', "two\nlines")
TOOLS = tuple(
    json.dumps(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"Gets the {name} of a city.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "description": "The city."},
                        "days": {"type": "integer", "enum": [1, 2]},
                    },
                    "required": ["city"],
                },
            },
        },
        ensure_ascii=False,
    )
    for name in ("get_weather", "get_news")
)


class _Writer:
    """Writes one conversation."""

    def __init__(self, seed: int, more: str, *, tools: bool, parallel: bool, thinking: bool):
        self._more = more
        self._random = random.Random(seed)
        self._tools, self._parallel, self._thinking = tools, parallel, thinking
        self.messages: list[Message] = []

    def _text(self, kind: str, choices: tuple[str, ...] = TEXTS) -> str:
        mark = f"{kind}{len(self.messages)}"
        return f"«{mark} {self._more}{self._random.choice(choices)} {mark}»"

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _thought(self) -> str:
        return self._text("t") if self._thinking and self._chance(0.7) else ""

    def _call(self, name: str, number: int) -> ToolCall:
        arguments = {"city": self._text("c", CITIES), "days": self._random.randint(1, 2)}
        identity = f"call{len(self.messages):03}{number:02}"  # Mistral wants nine letters
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False), identity)

    def system(self) -> None:
        self.messages.append(Message("system", self._text("s")))

    def exchange(self) -> None:
        self.messages.append(Message("user", self._text("u")))
        for _ in range(self._random.randint(1, 2) if self._tools and self._chance(0.7) else 0):
            wanted = self._random.randint(1, 2) if self._parallel else 1
            calls = tuple(
                self._call(name, n) for n, name in enumerate(("get_weather", "get_news")[:wanted])
            )
            content = self._text("a") if self._chance(0.3) else ""
            called = Message("assistant", content, thinking=self._thought(), calls=calls)
            self.messages.append(called)
            for call in calls:
                result = self._text("r")
                self.messages.append(Message("tool", result, call_id=call.id, name=call.name))
        self.messages.append(Message("assistant", self._text("a"), thinking=self._thought()))


def made_up(
    seed: int, *, tools: bool, parallel: bool, thinking: bool, system: bool = False, more: str = ""
) -> Conversation:
    """A conversation of one to four exchanges.

    Args:
      more: stands in every text.
    """
    writer = _Writer(seed, more, tools=tools, parallel=parallel, thinking=thinking)
    if system:
        writer.system()
    for _ in range(random.Random(seed).randint(1, 4)):
        writer.exchange()
    return Conversation(tuple(writer.messages), TOOLS if tools else ())
