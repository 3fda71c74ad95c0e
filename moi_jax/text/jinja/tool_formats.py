"""The name of the form in which a template writes calls, and of the parser that servers have."""

import re
from typing import NamedTuple

from moi_jax.text.jinja.call_probe import call_form
from moi_jax.text.jinja.call_syntax import CallForm
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.templates import Template


class ToolFormat(NamedTuple):
    """A form of calls that servers know.

    Attributes:
      pattern: of a rendered call.
      vllm, sglang: the value of --tool-call-parser; "" if there is none.
    """

    name: str
    pattern: re.Pattern[str]
    vllm: str
    sglang: str


# The names of vLLM's docs/features/tool_calling.md and SGLang's docs/advanced_features/tool_parser.
KNOWN = tuple(
    ToolFormat(name, re.compile(pattern, re.DOTALL), vllm, sglang)
    for name, pattern, vllm, sglang in (
        ("hermes", r'\s*<tool_call>\s*\{"name": ', "hermes", "qwen"),
        ("qwen3_coder", r"\s*<tool_call>\s*<function=", "qwen3_coder", "qwen3_coder"),
        ("llama3_json", r'\s*\{"name": .*"parameters": ', "llama3_json", "llama3"),
        ("mistral", r"\s*\[TOOL_CALLS\]", "mistral", "mistral"),
        ("pythonic", r"\s*\[\w+\(", "pythonic", "pythonic"),
        ("lfm2", r"\s*<\|tool_call_start\|>\[\w+\(", "lfm2", "lfm2"),
        ("glm45", r"\s*<tool_call>\w+\s*<arg_key>", "glm45", "glm"),
        ("deepseek_v3", r"\s*<｜tool▁calls▁begin｜>.*```json", "deepseek_v3", "deepseekv3"),
        ("deepseek_v31", r"\s*<｜tool▁calls▁begin｜>", "deepseek_v31", "deepseekv31"),
        ("phi4_mini_json", r"\s*(<\|tool_call\|>|functools)\[", "phi4_mini_json", ""),
        ("harmony", r"\s*to=functions\.", "openai", "gpt-oss"),
        ("gemma4", r"\s*<\|tool_call>call:", "gemma4", ""),
    )
)


def describe_template(template: Template) -> str:
    """What a chat template is and what it can do, in one line."""
    if not isinstance(template, JinjaTemplate):
        return template.name
    abilities = []
    if template.renders_tools:
        known = tool_format(template)
        abilities.append(f"tools ({known.name if known else 'in a form of its own'})")
    if template.style.thinking:
        abilities.append("thinking" + (" or not, as asked" if template.chooses_thinking else ""))
    if template.default_prompt is not None:
        abilities.append("a default system prompt")
    return f"the checkpoint's own, with {', '.join(abilities) or 'neither tools nor thinking'}"


def tool_format(template: JinjaTemplate) -> ToolFormat | None:
    """The known form of the template's calls; None if it has no calls, or a form of its own."""
    form: CallForm | None = call_form(template)
    if form is None:
        return None
    return next((known for known in KNOWN if known.pattern.match(form.example)), None)
