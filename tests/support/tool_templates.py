"""Small chat templates of our own with tools, one for each way of writing calls."""

import json

from moi_jax.text.tokenizer import Tokenizer

from support.tokenizers import with_specials

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WEATHER = json.dumps(
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
)

_FRAME = """\
{%%- if tools %%}<|im_start|>system
{%% if messages[0].role == 'system' %%}{{ messages[0].content }}
{%% endif %%}Tools:
{%% for tool in tools %%}{{ tool | tojson }}
{%% endfor %%}<|im_end|>
{%% elif messages[0].role == 'system' %%}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{%% endif %%}
{%%- for message in messages if message.role != 'system' %%}
<|im_start|>{{ message.role }}
{%% if message.reasoning_content %%}<think>
{{ message.reasoning_content }}
</think>

{%% endif %%}{{ message.content or '' }}
{%%- if message.tool_calls %%}%s{%% endif %%}<|im_end|>
{%% endfor %%}
{%%- if add_generation_prompt %%}<|im_start|>assistant
{%% if enable_thinking is defined and not enable_thinking %%}<think>

</think>

{%% endif %%}{%% endif %%}"""

_EACH = "{% for call in message.tool_calls %}{% set f = call.function %}"
_ALL = "{% endfor %}"
CALLS = {
    "hermes": _EACH
    + "{{ '\\n' }}<tool_call>\n"
    + '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
    + _ALL,
    "llama3_json": "{% set f = message.tool_calls[0].function %}{% if message.tool_calls[1:] %}"
    + "{{ raise_exception('one call only') }}{% endif %}"
    + '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}',
    "mistral": "[TOOL_CALLS] ["
    + _EACH
    + '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}, "id": "{{ call.id }}"}'
    + "{% if not loop.last %}, {% endif %}"
    + _ALL
    + "]",
    "named": _EACH + "[CALL]{{ f.name }}[ID]{{ call.id }}[ARGS]{{ f.arguments | tojson }}" + _ALL,
    "qwen3_coder": _EACH
    + "{{ '\\n' }}<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments | items %}"
    + "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
    + "</function>\n</tool_call>"
    + _ALL,
    "pythonic": "["
    + _EACH
    + "{{ f.name }}({% for k, v in f.arguments | items %}{{ k }}={{ v | tojson }}"
    + "{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}"
    + _ALL
    + "]",
}  # fmt: skip
TEMPLATES = {name: _FRAME % calls for name, calls in CALLS.items()}


def with_calls(name: str, **more: str) -> Tokenizer:
    """A tokenizer of the sample set's words with one of `TEMPLATES`."""
    files = {"tokenizer.json": with_specials(*SPECIALS), "chat_template.jinja": TEMPLATES[name]}
    return Tokenizer.from_files({**files, **more})
