"""T-Eval with tools in the model's own form: prompts, calls read back, and their scores."""

import json

import pytest

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Response
from moi_jax.evaluation.tasks.teval import TEval
from moi_jax.text.answers import read_answer
from moi_jax.text.rendering import render_prompt

from support.tool_templates import with_calls

PLACE = {"name": "place", "type": "STRING", "description": "A town."}
NIGHTS = {"name": "nights", "type": "NUMBER", "description": "How many."}
DOCUMENTED = [
    {
        "name": "Bnb",
        "tool_description": "Rooms.",
        "api_list": [
            {
                "name": "search",
                "description": "Finds rooms.",
                "required_parameters": [PLACE],
                "optional_parameters": [NIGHTS],
                "return_data": [],
            },
            {
                "name": "price",
                "description": "Tells a price.",
                "required_parameters": [{"name": "id", "type": "NUMBER", "description": "Which."}],
                "optional_parameters": [],
            },
            {"name": "book", "required_parameters": [], "optional_parameters": []},
        ],
    }
]
SYSTEM = "You can use Bnb.search and Bnb.price. Answer with thought, name and args. Begin!"
FIRST = {"thought": "I look.", "name": "Bnb.search", "args": {"place": "Rome"}}
SECOND = {"thought": "I ask the price.", "name": "Bnb.price", "args": {"id": 7}}
LAST = {"thought": "I know.", "name": "FinishAction", "args": "It is 9 euros."}
TURNS = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "What is a night in Rome?"},
    {"role": "assistant", "content": json.dumps(FIRST)},
    {"role": "system", "content": "response: [{'id': 7}]"},
]
MARKS = {
    "thought_start": "Goal: ", "thought_end": "\n", "action_start": "Tool: ",
    "action_end": "\n", "args_start": "Args: ", "args_end": "\n",
}  # fmt: skip
CALL = {"action": "Bnb.search", "args": {"place": "Rome", "nights": 2}}


def instruct(form, template):
    turns = [TURNS[0], {"role": "user", "content": "Search Rome, 2 nights."}]
    meta = {"response_format": form}
    return {
        "origin_prompt": turns, "template": template, "meta_data": meta, "ground_truth": CALL,
    }  # fmt: skip


FILES = {
    "api_descrip": DOCUMENTED,
    "instruct_v2": {
        "a": instruct("json", {"thought": "goal", "action": "tool", "args": "input"}),
        "b": instruct("string", MARKS),
    },
    "reason_retrieve_understand_json_v2": {
        "a": {"origin_prompt": TURNS, "ground_truth": SECOND},
        "b": {"origin_prompt": TURNS, "ground_truth": LAST},
    },
    "review_str_v2": {
        "a": {"origin_prompt": TURNS[:2], "ground_truth": {"answer": "B"}},
    },
}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "teval").mkdir(exist_ok=True)
        (tmp_path / "teval" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def task(folder, tools="native"):
    def embed(texts):
        return [[float(len(text)), 1.0] for text in texts]

    return TEval(BenchmarkOptions(folder, folder, teval_tools=tools), embed)


def test_the_prompt_lists_the_tools_and_writes_earlier_calls_as_the_template_does(folder):
    items = {item.id: item for item in task(folder).load()}
    item = items["reason_retrieve_understand_json_v2/a"]
    functions = [json.loads(tool)["function"] for tool in item.tools]
    assert [function["name"] for function in functions] == ["Bnb.price", "Bnb.search"]
    assert functions[1]["parameters"] == {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "A town."},
            "nights": {"type": "number", "description": "How many."},
        },
        "required": ["place"],
    }
    tokenizer = with_calls("hermes")
    text = tokenizer.decode(render_prompt(item.messages, tokenizer, "You help.", item.tools))
    assert "Begin!" not in text
    assert '"name": "Bnb.search", "arguments": {"place": "Rome"}' in text
    assert "[{'id': 7}]" in text
    assert "response:" not in text
    # The subtasks whose answer is no call are those of the published form.
    published = {item.id: item for item in task(folder, "published").load()}
    assert items["review_str_v2/a"] == published["review_str_v2/a"]
    assert not any(item.tools for item in published.values())


CALLED = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
SEARCHED = CALLED % ("Bnb.search", '{"place": "Rome", "nights": 2}')


@pytest.mark.parametrize(
    ("id", "text", "expected"),
    [
        ("instruct_v2/a", SEARCHED, {"format": 1, "args": 1}),
        ("instruct_v2/b", SEARCHED, {"format": 1, "args": 1}),
        ("instruct_v2/a", CALLED % ("Bnb.search", '{"place": "Rome"}'), {"args": 2 / 3}),
        ("instruct_v2/b", CALLED % ("Bnb.price", '{"place": "Rome"}'), {"args": 1 / 3}),
        ("instruct_v2/a", "I would search Rome.", {"format": 0, "args": 0}),
        (
            "reason_retrieve_understand_json_v2/a",
            "I ask the price.\n" + CALLED % ("Bnb.price", '{"id": 7}'),
            {"thought": 1, "name": 1, "args": 1},
        ),
        (
            "reason_retrieve_understand_json_v2/a",
            CALLED % ("Bnb.search", '{"id": 8}'),
            {"thought": 0, "name": 0, "args": 0},
        ),
        ("reason_retrieve_understand_json_v2/b", "It is 9 euros.", {"name": 1}),
        ("reason_retrieve_understand_json_v2/b", SEARCHED, {"name": 0}),
    ],
)
def test_a_call_scores_as_it_would_in_the_published_form(folder, id, text, expected):
    benchmark, template = task(folder), with_calls("hermes").template
    item = next(item for item in benchmark.load() if item.id == id)
    response = Response((text,), ("stop",), answers=(read_answer(text, template, item.tools),))
    (score,) = benchmark.score([(item, response)])
    metrics = {name.split("/")[1]: value for name, value in score.metrics.items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_the_result_says_that_it_is_not_the_published_form(folder):
    benchmark = task(folder)
    items = benchmark.load()
    assert benchmark.settings()["teval_tools"] == "native"
    assert "in the model's own form" in " ".join(benchmark.notes(items, []))
    assert not benchmark.is_complete(items)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("api_descrip", None, "native tools need T-Eval's documentation"),
        ("api_descrip", [{"name": "Bnb"}], "is no documentation of T-Eval's APIs"),
        (
            "reason_retrieve_understand_json_v2",
            {"a": {"origin_prompt": TURNS[1:], "ground_truth": SECOND}},
            "record 'a': its system text names no API",
        ),
        (
            "reason_retrieve_understand_json_v2",
            {"a": {"origin_prompt": TURNS[:3], "ground_truth": SECOND}},
            "record 'a': origin_prompt must end with a turn",
        ),
        (
            "reason_retrieve_understand_json_v2",
            {"a": {"origin_prompt": [*TURNS[:2], TURNS[3]], "ground_truth": SECOND}},
            "record 'a': a system turn follows no call",
        ),
    ],
)
def test_what_cannot_be_asked_natively_is_named(folder, name, content, message):
    path = folder / "teval" / f"{name}.json"
    path.unlink() if content is None else path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        task(folder).load()
