"""Log-likelihoods of continuations against torch and the reference Qwen-7B, however batched."""

import math

import jax
import numpy as np
import pytest
from test_families import imported, transformers_model

from moi_jax import config as config_lib
from moi_jax.models.config import read_hf_config
from moi_jax.models.decoder import Decoder
from moi_jax.models.published import read_published
from moi_jax.sampling.likelihood import LikelihoodScorer
from moi_jax.training.sharding import make_mesh, parameter_shardings


def scorer(config, **settings):
    return LikelihoodScorer(lambda parameters: Decoder(config, parameters), config, **settings)


def scored(scorer, parameters, pairs):
    """The likelihoods in the order of the pairs; each comes once."""
    found = list(scorer.run(parameters, pairs))
    assert sorted(index for index, _ in found) == list(range(len(pairs)))
    return [likelihood for _, likelihood in sorted(found, key=lambda f: f[0])]


def expected(logits, context, continuation):
    """By the definition, in float64; logits [S, V] of context and continuation."""
    logits = np.asarray(logits, np.float64)[len(context) - 1 :][: len(continuation)]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = log_probs[np.arange(len(continuation)), continuation]
    return float(at.sum()), bool((logits.argmax(-1) == continuation).all())


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama of transformers, ours, and pairs of every kind with what torch says of them."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
    model = transformers_model("llama 3")
    config = read_hf_config(model.config.to_json_string(), "llama")
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    ids = np.random.default_rng(0).integers(0, 90, 400).tolist()
    lengths = [(1, 1), (1, 30), (5, 3), (20, 17), (31, 1), (31, 2), (40, 18), (50, 14), (62, 3)]
    pairs = [(ids[n : n + c], ids[200 + n :][:k]) for n, (c, k) in enumerate(lengths)]
    # Choices by their letters, and one of two tokens that the model reads the same of.
    pairs += [(ids[:10], [letter]) for letter in (3, 4, 5, 6)] + [(ids[:9], [ids[9], 5])]

    def logits(tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()

    greedy = ids[:7]
    for _ in range(20):
        greedy = [*greedy, int(logits(greedy)[-1].argmax())]
    pairs += [(greedy[:7], greedy[7:]), (greedy[:7], [*greedy[7:20], greedy[20] ^ 1])]
    pairs += [(greedy[:7], [greedy[7] ^ 1, *greedy[8:]])]
    truth = [expected(logits([*c, *k]), c, k) for c, k in pairs]
    return config, imported(config, tensors), pairs, truth


def check(likelihoods, truth):
    assert all(likelihood.finish == "scored" for likelihood in likelihoods)
    np.testing.assert_allclose(
        [likelihood.log_likelihood for likelihood in likelihoods],
        [log_likelihood for log_likelihood, _ in truth],
        atol=2e-5,
        rtol=1e-6,
    )
    assert [likelihood.greedy for likelihood in likelihoods] == [greedy for _, greedy in truth]


@pytest.mark.parametrize("rows", [1, 4])
def test_likelihoods_equal_torch_however_they_are_batched(llama, rows):
    config, parameters, pairs, truth = llama
    assert [greedy for _, greedy in truth[-3:]] == [True, False, False]
    check(scored(scorer(config, rows=rows), parameters, pairs), truth)


def test_likelihoods_are_the_same_on_a_mesh(llama):
    config, parameters, pairs, truth = llama
    mesh = make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(parameters, parameter_shardings(config, mesh))
    check(scored(scorer(config, rows=3, mesh=mesh), placed, pairs), truth)


def test_choices_of_one_question_share_a_row(llama):
    config, parameters, pairs, truth = llama
    batches = []

    class Counted(LikelihoodScorer):
        def _score(self, parameters, batch, width, before):
            batches.append(len(batch))
            return super()._score(parameters, batch, width, before)

    counted = Counted(lambda p: Decoder(config, p), config)
    check(scored(counted, parameters, pairs[9:14]), truth[9:14])
    assert batches == [1]


def test_a_pair_beyond_the_context_is_told_and_the_rest_scored(llama):
    config, parameters, pairs, truth = llama
    long = [(pairs[6][0], pairs[6][1]), (pairs[6][0], pairs[6][1][:9])]  # 58 and 49 tokens
    found = scored(scorer(config, context=48), parameters, [*long, *pairs[:3]])
    assert found[0].finish == "too_long"
    assert math.isnan(found[0].log_likelihood)
    # The last token is not read, so that one more than the context fits.
    check(found[1:], [(found[1].log_likelihood, found[1].greedy), *truth[:3]])


def test_logits_that_are_not_finite_are_told(llama):
    config, parameters, _, _ = llama
    embedding = np.array(parameters["embedding"])
    embedding[7] = math.nan
    damaged = {**parameters, "embedding": embedding}
    found = scored(scorer(config), damaged, [([7], [3]), ([8, 9], [3]), ([8, 7], [3, 4])])
    assert [likelihood.finish for likelihood in found] == ["not_finite", "scored", "not_finite"]
    assert math.isnan(found[0].log_likelihood)
    assert math.isfinite(found[1].log_likelihood)


@pytest.mark.parametrize("length", [32, 65, 100])
def test_qwen_v1_beyond_its_length_reads_as_the_reference_does(golden, length):
    """Dynamic NTK and log-n attention of B, whose seq_length is 64."""
    config, parameters = read_published(golden / "B", None)
    arrays = np.load(golden / "B" / "logits.npz")
    tokens = arrays[f"x{length}"][0].tolist()
    next_token = int(arrays[f"eval_{length}"][0, -1].argmax())
    for start in (1, length - 3, length):
        pair = (tokens[:start], [*tokens[start:], next_token])
        truth = expected(arrays[f"eval_{length}"][0], *pair)
        (found,) = scored(scorer(config, context=128), parameters, [pair])
        np.testing.assert_allclose(found.log_likelihood, truth[0], rtol=1e-6, atol=2e-5)
        assert found.greedy == truth[1]


def test_bfloat16_models_are_scored_in_float32(llama):
    config, parameters, pairs, truth = llama
    low = LikelihoodScorer(
        lambda p: Decoder(config, p, compute_dtype="bfloat16"), config, context=64
    )
    found = scored(low, jax.tree.map(lambda x: x.astype("bfloat16"), parameters), pairs)
    values = [likelihood.log_likelihood for likelihood in found]
    np.testing.assert_allclose(values, [log_likelihood for log_likelihood, _ in truth], rtol=0.05)
    assert any(np.float32(v) != np.float32(v).astype("bfloat16") for v in values)
