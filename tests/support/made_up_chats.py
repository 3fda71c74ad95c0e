"""Made-up conversations with all that a chat template may have to write.

Every text stands between two sentinels with its own number, which say in a rendered text whose part
is where: «u3 ... u3» is the text of message 3, by the user; t is a thought, c a call, r a result.
"""

import json
import random
from dataclasses import replace

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
SPACES = (("", ""),) * 4 + ((" ", "\n"), ("\n\n", ""), ("", "  "))
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


def between_sentinels(text: str, mark: str) -> str:
    """The text between sentinels; white space around it stays outside."""
    core = text.strip()
    before, _, after = text.partition(core) if core else (text, "", "")
    return f"{before}«{mark} {core} {mark}»{after}"


def with_sentinels(conversation: Conversation) -> Conversation:
    """The conversation with sentinels in every text, and in the arguments of every call."""
    kinds = {"system": "s", "user": "u", "assistant": "a", "tool": "r"}
    messages = []
    for n, message in enumerate(conversation.messages):
        calls = tuple(
            call._replace(
                arguments=json.dumps(
                    {**json.loads(call.arguments), "mark": f"«c{n} c{n}»"}, ensure_ascii=False
                )
            )
            for call in message.calls
        )
        content, thinking = message.content, message.thinking
        messages.append(
            replace(
                message,
                content=content and between_sentinels(content, f"{kinds[message.role]}{n}"),
                thinking=thinking and between_sentinels(thinking, f"t{n}"),
                calls=calls,
            )
        )
    return replace(conversation, messages=tuple(messages))


class _Writer:
    """Writes one conversation."""

    def __init__(
        self, seed: int, more: str, spaced: bool, *, tools: bool, parallel: bool, thinking: bool
    ):
        self._more, self._spaced = more, spaced
        self._random = random.Random(seed)
        self._tools, self._parallel, self._thinking = tools, parallel, thinking
        self.messages: list[Message] = []

    def _text(self, kind: str, choices: tuple[str, ...] = TEXTS) -> str:
        before, after = self._random.choice(SPACES if self._spaced else SPACES[:1])
        text = f"{before}{self._more}{self._random.choice(choices)}{after}"
        return between_sentinels(text, f"{kind}{len(self.messages)}")

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
    seed: int,
    *,
    tools: bool,
    parallel: bool,
    thinking: bool,
    system: bool = False,
    more: str = "",
    spaced: bool = True,
) -> Conversation:
    """A conversation of one to four exchanges.

    Args:
      more: stands in every text.
      spaced: some texts have white space around them.
    """
    writer = _Writer(seed, more, spaced, tools=tools, parallel=parallel, thinking=thinking)
    if system:
        writer.system()
    for _ in range(random.Random(seed).randint(1, 4)):
        writer.exchange()
    return Conversation(tuple(writer.messages), TOOLS if tools else ())
