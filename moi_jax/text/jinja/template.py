"""A checkpoint's own chat template: what it can express, and the text that it gives."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jinja2

from moi_jax.common.errors import UserError
from moi_jax.text.conversations import BadRow, Conversation, Message, ToolCall
from moi_jax.text.jinja.chat import Style, tool_objects
from moi_jax.text.jinja.environment import Program, compile_program, own_sources, split_marks
from moi_jax.text.templates import FROM_CHECKPOINT, FixedTemplate, Template
from moi_jax.text.vocabulary_files import NAMED, read_object, token_text

if TYPE_CHECKING:
    from moi_jax.text.tokenizer import Tokenizer

VERSION = 1  # raise it when the rendered tokens change, or which of them are labels
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")

# The parts of the chats that show what a template can do. No template writes such words.
SYSTEM, ASKED, ANSWERED, ASKED_AGAIN = "Qsystemz", "Quserz", "Qanswerz", "Qagainz"
THOUGHT, CALLED, CITY, RESULT = "Qthoughtz", "qcalledz", "Qcityz", "Qresultz"
QUESTION, ANSWER = Message("user", ASKED), Message("assistant", ANSWERED)
CALL = Message("assistant", "", calls=(ToolCall(CALLED, f'{{"city": "{CITY}"}}', "abcdefghi"),))
RETURNED = Message("tool", RESULT, name=CALLED, call_id="abcdefghi")
OTHER_IDS = (
    QUESTION,
    replace(CALL, calls=(CALL.calls[0]._replace(id="call_0123456789"),)),
    replace(RETURNED, call_id="call_0123456789"),
)
TOOL = json.dumps(
    {
        "type": "function",
        "function": {
            "name": CALLED,
            "description": "Looks it up.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city."}},
                "required": ["city"],
            },
        },
    }
)


class JinjaTemplate(Template):
    """A chat template in Jinja, rendered for one tokenizer.

    Attributes:
      style: how it wants calls and thinking.
      default_prompt: the system text that it adds to a chat without a system turn; None if none.
      marks: whether it says itself what the assistant writes, by {% generation %}.
      constants: texts that it may compare the texts of messages with.
      specials: finds the tokenizer's special tokens in a text.
      equal: the template of ours that writes plain conversations in the same tokens, if any.
    """

    name = FROM_CHECKPOINT
    typed = True

    def __init__(self, tokenizer: "Tokenizer"):
        """Raises UserError: the tokenizer's files have no usable template."""
        settings: dict[str, Any] = {}
        for name in SETTINGS:
            settings |= read_object(tokenizer.files, name)
        self._named = {name: token_text(settings.get(name)) or "" for name in NAMED}
        self.sources = own_sources(tokenizer.files)
        if not self.sources:
            raise UserError(
                "the tokenizer has no chat template of its own; copy its chat_template.jinja or "
                "tokenizer_config.json beside it, or name a template with tokenizer.chat_template"
            )
        self._programs = {name: _compile(name, text) for name, text in self.sources.items()}
        self.marks = all(program.marks for program in self._programs.values())
        constants = {text for each in self._programs.values() for text in each.constants}
        self.constants = tuple(sorted(constants))
        known = tokenizer.special_tokens
        longest_first = sorted(map(re.escape, known), key=len, reverse=True)
        self.specials = re.compile("|".join(longest_first) or r"(?!)")
        self.controls = tuple(sorted(known.values()))
        self._probe(known)
        self.equal: FixedTemplate | None = None
        self._tags = tuple(text for text in self.constants if "<" in text or "[" in text)

    def fingerprint(self) -> str:
        """sha256 hex that changes when the template does, or a token that it has by name."""
        content = json.dumps([VERSION, self.sources, self._named], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _probe(self, known: Mapping[str, int]) -> None:
        """Finds out what the template can do by rendering a few chats."""
        self.style = Style(thinking=False)
        self._default_block = ("", "")  # what is before it, and the block of the default prompt
        plain = self._probed((QUESTION,), generate=True)
        answered = self._probed((QUESTION, ANSWER))
        if plain is None or answered is None or not (ASKED in plain and ANSWERED in answered):
            raise UserError(
                f"the chat template does not write a question and its answer"
                f"{self._refusal()}; name another template with tokenizer.chat_template"
            )
        thinking = Style(thinking=True)
        thought = Message("assistant", ANSWERED, thinking=THOUGHT)
        if THOUGHT in (self._probed((QUESTION, thought), style=thinking) or ""):
            self.style = thinking
        self.renders_tools = self._probe_tools()
        prompts = [self._probed((QUESTION,), generate=True, thinking=on) for on in (True, False)]
        self.chooses_thinking = prompts[0] != prompts[1]
        self._probe_system(plain)
        self._probe_ends(known, answered)

    def _probed(
        self, messages: Sequence[Message], tools: Sequence[str] = (), style: Style | None = None,
        generate: bool = False, thinking: bool | None = None,
    ) -> str | None:  # fmt: skip
        """The text of a chat; None if the template does not take it."""
        try:
            text = self._rendered(messages, tools, generate, style or self.style, thinking)
            return split_marks(text)[0]
        except BadRow:
            return None

    def _refusal(self) -> str:
        """Why the template refuses the simplest chats."""
        for messages, generate in (((QUESTION,), True), ((QUESTION, ANSWER), False)):
            try:
                self._rendered(messages, (), generate, self.style)
            except BadRow as bad:
                return f": {bad.detail}"
        return ""

    def _probe_tools(self) -> bool:
        """Whether tools, calls and results have a form; sets the style of calls."""
        if CALLED not in (self._probed((QUESTION,), (TOOL,), generate=True) or ""):
            return False
        chat = (QUESTION, CALL, RETURNED, ANSWER)
        for arguments in (True, False):
            for no_content in ("", None):
                style = Style(self.style.thinking, arguments, no_content)
                text = self._probed(chat, (TOOL,), style) or ""
                if text.count(CITY) == 1 and RESULT in text:
                    others = self._probed(OTHER_IDS, (TOOL,), style)
                    self.style = replace(style, short_ids=others is None)
                    return True
        return False

    def _probe_system(self, plain: str) -> None:
        """Whether a system text has a place, and what stands there by default."""
        self.default_prompt: str | None = None
        self.omits_system = True
        system = self._probed((Message("system", SYSTEM), QUESTION), generate=True) or ""
        self.takes_system = system.count(SYSTEM) == 1 and ASKED in system
        before, _, after = system.partition(SYSTEM)
        added = len(plain) - len(before + after)
        if not self.takes_system or added < 0:
            return
        fits = plain.startswith(before) and plain.endswith(after)
        default = plain[len(before) : len(before) + added]
        chat = (QUESTION, ANSWER, Message("user", ASKED_AGAIN))
        again = self._probed(chat, generate=True) or ""
        turns = after.partition(ASKED)[0]  # the end of a turn, and the header of the user's
        ended = (self._probed((QUESTION, ANSWER)) or "").rpartition(ANSWERED)[2]
        is_block = turns.startswith(ended) and f"{ANSWERED}{turns}{ASKED_AGAIN}" in again
        if fits and turns and is_block:
            begin = self._named["bos_token"]
            opening = begin if before.startswith(begin) else ""
            self._default_block = opening, before[len(opening) :] + default + ended
        elif added:
            self.omits_system = False
        if fits and (added or self._default_block[1]):
            self.default_prompt = default

    def _probe_ends(self, known: Mapping[str, int], answered: str) -> None:
        """The tokens that end a turn, and the padding."""
        ends = [self._last_special(answered, ANSWERED)]
        if self.renders_tools:
            called = self._probed((QUESTION, CALL, RETURNED), (TOOL,)) or ""
            ends.append(self._last_special(called.partition(RESULT)[0], CITY, first=True))
        found = [known[token] for token in ends if token]
        if not found or ends[0] is None:
            raise UserError(
                "the chat template writes no special token after an answer, so a model could not "
                "learn to end it; name another template with tokenizer.chat_template"
            )
        eos = known.get(self._named["eos_token"])
        self.end = found[0]
        self.stops = tuple(dict.fromkeys([*found, *([] if eos is None else [eos])]))
        pad = known.get(self._named["pad_token"])
        self.pad = next(number for number in (pad, eos, self.end) if number is not None)

    def _last_special(self, text: str, after: str, first: bool = False) -> str | None:
        found = self.specials.findall(text[text.rindex(after) :]) if after in text else []
        return found[0 if first else -1] if found else None

    def is_plain(self, conversation: Conversation, prompt: str | None) -> bool:
        """Whether `equal` writes the conversation as this template does.

        It does where there is nothing but contents, and where no content runs together with the
        template's white space before it, or holds a word of the template.
        """
        if self.equal is None or conversation.tools or (prompt or "")[:1].isspace():
            return False
        return not any(
            message.calls
            or message.thinking
            or message.role == "tool"
            or message.content[:1].isspace()
            or any(tag in message.content for tag in self._tags)
            or self.specials.search(message.content)
            for message in conversation.messages
        )

    def chat_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[str] = (),
        *,
        generate: bool = False,
        thinking: bool | None = None,
    ) -> str:
        """The text of a chat; a chat without a system turn has no system block.

        Args:
          generate: the text ends where the assistant's turn begins.
          thinking: whether a model that can do both shall think; None is the template's default.

        Raises:
          BadRow: the template refuses the chat.
        """
        marked = self.marked_chat(messages, tools, generate=generate, thinking=thinking)
        return split_marks(marked)[0]

    def marked_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[str] = (),
        *,
        generate: bool = False,
        thinking: bool | None = None,
    ) -> str:
        """Like `chat_text`, with the marks of {% generation %}."""
        system = messages[0].role == "system"
        if not system and tools and self.default_prompt is not None:
            messages = (Message("system", ""), *messages)  # the block of the tools remains
        text = self._rendered(messages, tools, generate, self.style, thinking)
        opening, block = self._default_block
        if system or tools or not block:
            return text
        if not text.startswith(opening + block):
            raise BadRow("template_error", "the chat template's own system prompt is not found")
        return opening + text[len(opening) + len(block) :]

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[str],
        generate: bool,
        style: Style,
        thinking: bool | None = None,
    ) -> str:
        name = "tool_use" if tools and "tool_use" in self._programs else "default"
        choice = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        try:
            return self._programs[name].render(
                messages=style.messages(messages),
                tools=tool_objects(tuple(tools)),
                documents=None,
                add_generation_prompt=generate,
                **self._named,
                **choice,
            )
        except Exception as error:  # a template is a program and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadRow("template_error", f"the chat template refuses it: {reason}") from None


def _compile(name: str, source: str) -> Program:
    try:
        return compile_program(source)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        raise UserError(
            f"the tokenizer's chat template ({name}{place}) is not valid Jinja: {error}; mend it, "
            f"or name another template with tokenizer.chat_template"
        ) from None
