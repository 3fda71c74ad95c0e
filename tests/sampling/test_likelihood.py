"""Log-likelihoods of continuations against torch and the reference Qwen-7B, however batched."""

import math

import jax
import numpy as np
import pytest

from moi_jax import config as config_lib
from moi_jax.checkpoints.hf.reader import read_published
from moi_jax.models.compute import Compute
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import parameter_shardings
from moi_jax.parallel.mesh import make_mesh
from moi_jax.sampling import likelihood
from moi_jax.sampling.likelihood import LikelihoodScorer

from support.limits import SECONDS, watched_batches


def make_scorer(config, dtype="float32", **settings):
    return LikelihoodScorer(make_model(config, Compute(dtype)), config, **settings)


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
def llama(tmp_path_factory):
    """A tiny Llama of transformers, as ours, and pairs with what torch says of them."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=90, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings).float()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.15)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    config, parameters = read_published(folder, None)
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
    return config, parameters, pairs, truth


@pytest.fixture(scope="module")
def scorer(llama):
    return make_scorer(llama[0], rows=4)


def check(likelihoods, truth):
    assert all(likelihood.finish == "scored" for likelihood in likelihoods)
    np.testing.assert_allclose(
        [likelihood.log_likelihood for likelihood in likelihoods],
        [log_likelihood for log_likelihood, _ in truth],
        atol=2e-5,
        rtol=1e-6,
    )
    assert [likelihood.greedy for likelihood in likelihoods] == [greedy for _, greedy in truth]


def test_likelihoods_equal_torch_together_and_one_by_one(llama, scorer, monkeypatch):
    _, parameters, pairs, truth = llama
    limits = watched_batches(monkeypatch)
    assert [greedy for _, greedy in truth[-3:]] == [True, False, False]
    check(scored(scorer, parameters, pairs), truth)
    check([scored(scorer, parameters, [pair])[0] for pair in pairs], truth)
    assert len(limits) > len(pairs)
    assert set(limits) == {SECONDS}


@pytest.mark.parametrize(
    "axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 3}], ids=str
)
def test_likelihoods_are_the_same_on_a_mesh(llama, axes):
    config, parameters, pairs, truth = llama
    mesh = make_mesh(config_lib.Mesh(**axes), jax.devices())
    placed = jax.device_put(parameters, parameter_shardings(config, mesh))
    scorer = make_scorer(config, rows=3, mesh=mesh)
    check(scored(scorer, placed, pairs[:6]), truth[:6])


def test_choices_of_one_question_share_a_row(llama, scorer, monkeypatch):
    _, parameters, pairs, truth = llama
    batches, score = [], scorer._score
    monkeypatch.setattr(
        scorer, "_score", lambda *arguments: batches.append(arguments[1]) or score(*arguments)
    )
    check(scored(scorer, parameters, pairs[9:14]), truth[9:14])
    assert batches == [[tuple(pairs[9][0])]]


def test_long_rows_come_in_smaller_batches(llama, monkeypatch):
    """The scores of their attention are as wide as they are long."""
    monkeypatch.setattr(likelihood, "PREFILL_TOKENS", 128)
    config, parameters, *_ = llama
    shapes = []

    def bind(parameters):
        model = make_model(config)(parameters)
        states = model.hidden_states
        model.hidden_states = lambda tokens, *a, **k: (
            shapes.append(tokens.shape) or states(tokens, *a, **k)
        )
        return model

    pairs = [(list(range(1, length)), [5]) for length in (10, 12, 14, 60, 61, 62)]
    found = scored(LikelihoodScorer(bind, config, rows=8), parameters, pairs)
    assert all(one.finish == "scored" for one in found)
    assert sorted(shapes) == [(2, 64), (4, 32)]


def test_a_pair_beyond_the_context_is_told_and_the_rest_scored(llama, scorer):
    _, parameters, pairs, truth = llama
    context, continuation = pairs[8]  # the last token is not read: 65 tokens fit 64
    found = scored(scorer, parameters, [([1, *context], continuation), pairs[8], pairs[0]])
    assert found[0].finish == "too_long"
    assert math.isnan(found[0].log_likelihood)
    check(found[1:], [truth[8], truth[0]])


def test_logits_that_are_not_finite_are_told(llama, scorer):
    _, parameters, _, _ = llama
    embedding = np.array(parameters["embedding"]["table"])
    embedding[7] = math.nan
    damaged = {**parameters, "embedding": {"table": embedding}}
    found = scored(scorer, damaged, [([7], [3]), ([8, 9], [3]), ([8, 7], [3, 4])])
    assert [likelihood.finish for likelihood in found] == ["not_finite", "scored", "not_finite"]
    assert math.isnan(found[0].log_likelihood)
    assert math.isfinite(found[1].log_likelihood)


def test_qwen_v1_beyond_its_length_reads_as_the_reference_does(golden):
    """Dynamic NTK and log-n attention of B, whose seq_length is 64."""
    config, parameters = read_published(golden / "B", None)
    arrays = np.load(golden / "B" / "logits.npz")
    pairs, truth = [], []
    for length in (65, 100):
        logits = arrays[f"eval_{length}"][0]
        tokens = [*arrays[f"x{length}"][0].tolist(), int(logits[-1].argmax())]
        for start in (1, length - 3, length):
            pairs.append((tokens[:start], tokens[start:]))
            truth.append(expected(logits, *pairs[-1]))
    assert truth[2][1]
    check(scored(make_scorer(config, context=128), parameters, pairs), truth)


def test_bfloat16_models_are_scored_in_float32(llama):
    config, parameters, pairs, truth = llama
    low = jax.tree.map(lambda x: x.astype("bfloat16"), parameters)
    found = scored(make_scorer(config, "bfloat16"), low, pairs[2:3])[0].log_likelihood
    assert found == pytest.approx(truth[2][0], rel=0.05)
    assert np.float32(found) != np.float32(found).astype("bfloat16")
