"""Greedy answers against the reference's cached generations, and how they stop."""

import json

import pytest

from moi_jax.models.decoder import Decoder
from moi_jax.models.published import read_published
from moi_jax.sampling.greedy import make_greedy


@pytest.mark.parametrize("fixture", ["A", "B"])
def test_greedy_tokens_equal_the_reference_with_its_cache(golden, fixture):
    """B's 60-token prompt grows past seq_length 64: NTK stays the prompt's, log-n switches on."""
    config, parameters = read_published(golden / fixture, None)
    greedy = make_greedy(lambda p: Decoder(config, p), stop=(), vocab_size=config.vocab_size)
    cases = json.loads((golden / "generate.json").read_text())[fixture]
    answers = greedy(parameters, [case["prompt"] for case in cases], 16)
    assert answers == [case["new_tokens"] for case in cases]
    if fixture == "B":  # the case tells the two ways apart
        assert cases[1]["new_tokens"] != cases[1]["new_tokens_recomputed_without_cache"]


def test_an_answer_ends_before_a_stop_token_and_within_its_length(golden):
    config, parameters = read_published(golden / "A", None)
    case = json.loads((golden / "generate.json").read_text())["A"][0]
    stop = case["new_tokens"][5]
    assert stop not in case["new_tokens"][:5]
    greedy = make_greedy(lambda p: Decoder(config, p), stop=(stop,), vocab_size=512)
    prompts = [case["prompt"], case["prompt"][:3]]
    assert greedy(parameters, prompts, 16)[0] == case["new_tokens"][:5]
    assert all(len(answer) <= 3 for answer in greedy(parameters, prompts, 3))


def test_rows_of_the_embedding_without_a_token_are_never_written(golden):
    config, parameters = read_published(golden / "A", None)
    case = json.loads((golden / "generate.json").read_text())["A"][0]
    assert max(case["new_tokens"]) >= 300
    greedy = make_greedy(lambda p: Decoder(config, p), stop=(), vocab_size=300)
    (answer,) = greedy(parameters, [case["prompt"]], 16)
    assert len(answer) == 16
    assert max(answer) < 300
