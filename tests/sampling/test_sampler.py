"""The sampler against plain recomputation, the reference's generations and transformers'."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich import filesize

from moi_jax import config as config_lib
from moi_jax.checkpoints.hf.reader import read_published
from moi_jax.checkpoints.hf.weights import import_parameters
from moi_jax.common.errors import UserError
from moi_jax.models import decoding, rotary
from moi_jax.models.compute import Compute
from moi_jax.models.config import read_hf_config
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import map_parameters, parameter_shardings, random_parameters
from moi_jax.models.presets import PRESETS
from moi_jax.parallel.mesh import make_mesh
from moi_jax.sampling.drafts import look_up
from moi_jax.sampling.requests import Completion, Request
from moi_jax.sampling.sampler import Sampler
from moi_jax.sampling.text_stream import TextStream
from moi_jax.sampling.token_sampling import SamplingParams, sample_tokens

from support.limits import SECONDS, watched_batches

# Wide random weights: the likeliest token leads by far more than rounding moves a logit. The first
# layer does not rotate its heads, the second one rotates half of each.
MODEL = dataclasses.replace(
    PRESETS["micro"], vocab_size=90, initializer_range=0.2,
    rope_layers=(False, True), partial_rotary_factor=0.5,
)  # fmt: skip


def as_text(ids):
    return "".join(f"{i} " for i in ids)


def sampler_of(config, bind=None, **settings):
    settings = {"stop_ids": (), "vocab_size": config.vocab_size, "decode": as_text, **settings}
    return Sampler(bind or make_model(config), config, **settings)


def completions(sampler, parameters, requests):
    answers = list(sampler.run(parameters, requests))
    assert sorted(index for index, _ in answers) == list(range(len(requests)))
    return [answer for _, answer in sorted(answers)]


def tokens_of(sampler, parameters, requests):
    return [list(answer.tokens) for answer in completions(sampler, parameters, requests)]


def random_prompts(lengths, vocab_size=90):
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocab_size, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def parameters():
    return random_parameters(MODEL, 0, jnp.float32)


def plain_greedy(config, parameters, requests, width=128):
    """The whole sequence anew for every token, one prompt at a time; NTK as of the prompt."""
    positions = np.arange(width, dtype=np.int32)[None]
    ones = np.ones((1, width), np.int32)

    @jax.jit
    def hidden_and_choice(tokens, length, end):
        model = make_model(config)(parameters)
        alpha = None
        if config.dynamic_ntk:
            alpha = jnp.broadcast_to(rotary.ntk_alpha(length, config.seq_length), (1, width))
        hidden = model.hidden_states(tokens, positions, ones, extend_context=True, rope_alpha=alpha)
        return jnp.argmax(model.logits(hidden)[0, end - 1])

    answers = []
    for request in requests:
        length = len(request.prompt)
        tokens = np.zeros((1, width), np.int32)
        tokens[0, :length] = request.prompt
        for end in range(length, length + request.max_new_tokens):
            tokens[0, end] = hidden_and_choice(tokens, length, end)
        answers.append(tokens[0, length : length + request.max_new_tokens].tolist())
    return answers


@pytest.mark.parametrize("fixture", ["A", "B"])
def test_greedy_tokens_equal_the_reference_with_its_cache(golden, fixture):
    """B's 60-token prompt grows past seq_length 64: NTK stays the prompt's, log-n switches on."""
    config, parameters = read_published(golden / fixture, None)
    cases = json.loads((golden / "generate.json").read_text())[fixture]
    requests = [Request(case["prompt"], max_new_tokens=16) for case in cases]
    answers = tokens_of(sampler_of(config, context=128), parameters, requests)
    assert answers == [case["new_tokens"] for case in cases]
    if fixture == "B":  # the case tells the two ways apart
        assert cases[1]["new_tokens"] != cases[1]["new_tokens_recomputed_without_cache"]


def test_prompts_past_the_trained_length_have_their_own_ntk_factors(golden):
    config, parameters = read_published(golden / "B", None)  # seq_length 64: factors 1, 3, 1, 3
    requests = [
        Request(p, max_new_tokens=20) for p in random_prompts((30, 65, 50, 100), config.vocab_size)
    ]
    sampler = sampler_of(config, context=128, slots=3)
    assert tokens_of(sampler, parameters, requests) == plain_greedy(config, parameters, requests)


TRANSFORMERS = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "llama": ("Llama", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_greedy_tokens_equal_transformers_generate(family):
    """64 tokens of 8 prompts of 1 to 40 tokens, in one batch and one by one."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name, sizes = TRANSFORMERS[family]
    theirs = getattr(transformers, f"{name}Config")(
        vocab_size=90, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more of them wait for each other on matrices this small
    model = getattr(transformers, f"{name}ForCausalLM")(theirs).float().eval()
    for parameter_name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    config = read_hf_config(theirs.to_json_string(), family)
    tensors = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    flat = dict(import_parameters(config, tensors.__getitem__, np.float32))
    parameters = map_parameters(config, lambda path, _: flat[path])

    prompts = random_prompts((1, 40, 7, 23, 33, 2, 16, 12))
    expected, margins = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
            max_new_tokens=64, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        expected.append(out.sequences[0, len(prompt) :].tolist())
        top = torch.stack(out.logits).topk(2).values
        margins.append((top[..., 0] - top[..., 1]).min().item())
    assert min(margins) > 1e-4  # logits differ by some 1e-6: no near-tie decides
    requests = [Request(prompt, max_new_tokens=64) for prompt in prompts]
    sampler = sampler_of(config)
    assert tokens_of(sampler, parameters, requests) == expected
    assert [tokens_of(sampler, parameters, [r])[0] for r in requests] == expected


@pytest.mark.parametrize(("slots", "shortest"), [(1, 128), (3, 32)])
def test_refilled_slots_give_the_tokens_of_plain_recomputation(
    parameters, monkeypatch, slots, shortest
):
    """Through caches that grow and shrink: lengths from 2 to 117, answers from 1 to 80."""
    monkeypatch.setattr("moi_jax.sampling.memory.SHORTEST_CACHE", shortest)
    asked = zip((37, 1, 90, 60, 20, 3, 64, 5), (80, 40, 20, 57, 1, 33, 17, 64), strict=True)
    prompts = [(length, count) for length, count in asked]
    texts = random_prompts([length for length, _ in prompts])
    requests = [
        Request(p, max_new_tokens=count) for p, (_, count) in zip(texts, prompts, strict=True)
    ]
    answers = completions(sampler_of(MODEL, slots=slots), parameters, requests)
    assert [list(a.tokens) for a in answers] == plain_greedy(MODEL, parameters, requests)
    assert {answer.finish for answer in answers} == {"length"}


@pytest.mark.parametrize("drafts", [1, 3, 6])
def test_drafts_change_no_answer_and_save_steps(parameters, monkeypatch, drafts):
    """Answers that end by a stop token, by their limit and by the context, in slots of few."""
    asked = zip(random_prompts((12, 30, 3, 50, 7, 60)), (60, 1, 33, 80, 2, 80), strict=True)
    requests = [Request(prompt, max_new_tokens=count) for prompt, count in asked]
    monkeypatch.setattr("moi_jax.sampling.sampler.STEPS", 1)

    def answer(drafts, stops):
        sampler = sampler_of(MODEL, slots=3, context=100, stop_ids=stops, draft_tokens=drafts)
        steps, generate = [], sampler._generate
        monkeypatch.setattr(sampler, "_generate", lambda *a: steps.append(1) or generate(*a))
        return completions(sampler, parameters, requests), len(steps)

    expected, without = answer(0, ())
    found, steps = answer(drafts, ())
    assert found == expected
    assert steps < without
    for stop in {expected[0].tokens[20], expected[3].tokens[30]}:
        expected, _ = answer(0, (stop,))
        assert {one.finish for one in expected} == {"stop", "length"}
        assert answer(drafts, (stop,))[0] == expected


@pytest.mark.parametrize(("worthwhile", "tried"), [(0, {3}), (1.1, {3, 0})])
def test_drafts_are_tried_while_the_guesses_are_often_right(
    parameters, monkeypatch, worthwhile, tried
):
    monkeypatch.setattr("moi_jax.sampling.sampler.WORTHWHILE", worthwhile)
    sampler, drafts = sampler_of(MODEL, draft_tokens=3), []
    generate = sampler._generate
    monkeypatch.setattr(sampler, "_generate", lambda *a: drafts.append(a[-1]) or generate(*a))
    requests = [Request([1, 2, 3], max_new_tokens=90)]
    assert tokens_of(sampler, parameters, requests) == plain_greedy(MODEL, parameters, requests)
    assert drafts[0] == 3
    assert set(drafts) == tried
    assert drafts == sorted(drafts, reverse=True)  # with 1.1 only the first step has them
    drafts.clear()
    tokens_of(sampler, parameters, [dataclasses.replace(requests[0], temperature=1.0)])
    assert set(drafts) == {0}


@pytest.mark.parametrize(("drafts", "length"), [(0, 16), (1, 32)])
def test_a_cache_that_is_full_after_some_steps_holds_their_last_token(
    parameters, monkeypatch, drafts, length
):
    """A fresh request gets one token of its prompt, and then those of 16 steps."""
    monkeypatch.setattr("moi_jax.sampling.memory.SHORTEST_CACHE", 32)
    # Every guess is right: they are looked up in the answer itself.
    request = Request(random_prompts((length,))[0], max_new_tokens=60)
    (expected,) = plain_greedy(MODEL, parameters, [request])
    text = jnp.asarray([*request.prompt, *expected, 0, 0])

    def told(tokens, lengths, count):
        return text[lengths[:, None] + jnp.arange(count)]

    monkeypatch.setattr("moi_jax.sampling.slots.look_up", told)
    sampler = sampler_of(MODEL, slots=1, draft_tokens=drafts)
    assert tokens_of(sampler, parameters, [request]) == [expected]


def test_the_first_guess_is_counted_with_and_without_drafts(parameters, monkeypatch):
    prompt = random_prompts((30,))[0]
    for drafts in (0, 2):
        sampler, counts = sampler_of(MODEL, slots=1, draft_tokens=drafts), []
        generate = sampler._generate

        def watched(*given, generate=generate, counts=counts):
            cache, slots, guesses = generate(*given)
            counts.append((int(guesses.right), int(guesses.made), int(slots.length[0])))
            return cache, slots, guesses

        monkeypatch.setattr("moi_jax.sampling.sampler.STEPS", 1)
        monkeypatch.setattr(sampler, "_generate", watched)
        (answer,) = tokens_of(sampler, parameters, [Request(prompt, max_new_tokens=60)])
        text, length = jnp.asarray([*prompt, *answer]), len(prompt) + 1
        for right, made, after in counts:
            guess = look_up(text[None], jnp.asarray([length]), 1)
            # The last token ends the answer, so nothing is made of a right guess at it.
            assert right == (int(guess[0, 0]) == text[length] and length + 1 < len(text))
            assert made == 1
            length = after
        assert length == len(text)


def test_a_long_answer_does_not_hold_up_the_others(parameters):
    requests = [
        Request([1], max_new_tokens=100),
        *(Request([2, n], max_new_tokens=9) for n in range(8)),
    ]
    sampler = sampler_of(MODEL, slots=2, draft_tokens=0)
    order = [index for index, _ in sampler.run(parameters, requests)]
    assert order == [*range(1, 9), 0]


def test_the_cache_and_the_rows_lie_on_the_mesh_and_the_tokens_are_the_same(parameters):
    asked = zip(random_prompts((9, 30, 2, 17, 5)), (20, 9, 33, 20, 8), strict=True)
    requests = [Request(prompt, max_new_tokens=count) for prompt, count in asked]
    one = sampler_of(MODEL, slots=4)
    expected = tokens_of(one, parameters, requests)
    mesh = make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2), jax.devices())
    placed = jax.device_put(parameters, parameter_shardings(MODEL, mesh))
    sampler = sampler_of(MODEL, slots=3, mesh=mesh)
    assert sampler.slots == 4
    assert sampler.cache_bytes == one.cache_bytes // 8
    assert tokens_of(sampler, placed, requests) == expected
    assert jax.sharding.get_abstract_mesh().empty  # left as it was


def test_the_tokens_are_the_same_where_a_context_axis_splits_the_prompts(parameters):
    requests = [Request(prompt, max_new_tokens=12) for prompt in random_prompts((9, 60, 2))]
    expected = tokens_of(sampler_of(MODEL, slots=4), parameters, requests)
    mesh = make_mesh(config_lib.Mesh(fsdp=2, context=3), jax.devices())
    placed = jax.device_put(parameters, parameter_shardings(MODEL, mesh))
    assert tokens_of(sampler_of(MODEL, slots=4, mesh=mesh), placed, requests) == expected


SAMPLED = [
    Request(prompt, max_new_tokens=24, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for prompt, temperature, top_k, top_p, seed in zip(
        [*random_prompts((5, 17, 30, 2)), [8] * 9, [8] * 9],
        (1.0, 0.7, 0.0, 1.5, 1.0, 1.0),
        (0, 5, 0, 0, 40, 40),
        (1.0, 1.0, 1.0, 0.8, 0.9, 0.9),
        (0, 1, 2, 3, 4, 2**40 + 5),
        strict=True,
    )
]


def test_draws_depend_on_seed_and_index_alone(parameters):
    """Not on the slots, on what is beside a request or on the order of requests."""
    sampler = sampler_of(MODEL, slots=3)
    expected = tokens_of(sampler, parameters, SAMPLED)
    assert tokens_of(sampler, parameters, SAMPLED[::-1]) == expected[::-1]
    assert [tokens_of(sampler, parameters, [r])[0] for r in SAMPLED] == expected
    assert expected[4] != expected[5]  # but for their seeds they are the same


def drawn(logits, temperature, top_k, top_p, count=4000):
    """How often each id is chosen over so many seeds, as shares."""
    params = SamplingParams(
        *(jnp.full(count, x) for x in (temperature, top_k, top_p)), jnp.arange(count)
    )
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    ids = jax.jit(sample_tokens)(rows, params, jnp.zeros(count, jnp.int32))
    return np.bincount(ids, minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, [0.4, 0.3, 0.2, 0.1]),
        (0.5, 0, 1.0, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (1.0, 2, 1.0, [4 / 7, 3 / 7, 0, 0]),
        (1.0, 0, 0.65, [4 / 7, 3 / 7, 0, 0]),
        (1.0, 0, 0.75, [4 / 9, 3 / 9, 2 / 9, 0]),
        (1.0, 3, 0.5, [4 / 7, 3 / 7, 0, 0]),  # of the three the first two reach a half
        (1.0, 0, 1e-6, [1, 0, 0, 0]),
        (1.0, 0, 1e-50, [1, 0, 0, 0]),  # nothing in float32
        (0.0, 0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_ids_are_drawn_by_temperature_then_top_k_then_top_p(temperature, top_k, top_p, expected):
    shares = drawn(np.log([0.4, 0.3, 0.2, 0.1]), temperature, top_k, top_p)
    np.testing.assert_allclose(shares, expected, atol=0.03)
    np.testing.assert_array_equal(shares == 0, np.array(expected) == 0)


def test_a_large_vocabulary_is_cut_where_sorting_cuts_it():
    logits = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    ranked = np.argsort(-logits)
    probabilities = np.exp(logits[ranked].astype(np.float64))
    nucleus = np.searchsorted(np.cumsum(probabilities / probabilities.sum()), 0.3) + 1
    assert 20 < nucleus < 200
    for top_k, top_p, kept in ((7, 1.0, 7), (0, 0.3, nucleus)):
        shares = drawn(logits, 1.0, top_k, top_p, count=2000)
        assert set(np.flatnonzero(shares)) <= set(ranked[:kept])
        assert len(np.flatnonzero(shares)) > 0.9 * kept


def test_a_stop_token_ends_an_answer_and_is_no_part_of_it(golden):
    config, parameters = read_published(golden / "A", None)
    case = json.loads((golden / "generate.json").read_text())["A"][0]
    expected, stop = case["new_tokens"], case["new_tokens"][5]
    assert stop not in expected[:5]
    sampler = sampler_of(config, stop_ids=(stop,))
    requests = [
        Request(case["prompt"], max_new_tokens=16),
        Request(case["prompt"], max_new_tokens=3),
    ]
    assert completions(sampler, parameters, requests) == [
        Completion(tuple(expected[:5]), as_text(expected[:5]), "stop"),
        Completion(tuple(expected[:3]), as_text(expected[:3]), "length"),
    ]
    at_once = sampler_of(config, stop_ids=(expected[0],))
    assert completions(at_once, parameters, requests[:1]) == [Completion((), "", "stop")]


def test_rows_of_the_embedding_without_a_token_are_never_written(golden):
    config, parameters = read_published(golden / "A", None)
    case = json.loads((golden / "generate.json").read_text())["A"][0]
    assert max(case["new_tokens"]) >= 300
    requests = [
        Request(case["prompt"], max_new_tokens=16),
        Request(case["prompt"], max_new_tokens=16, temperature=2.0),
    ]
    for answer in tokens_of(sampler_of(config, vocab_size=300), parameters, requests):
        assert len(answer) == 16
        assert max(answer) < 300


def test_a_stop_string_cuts_the_text_and_is_never_shown(parameters):
    request = Request([5, 6], max_new_tokens=40)
    (whole,) = tokens_of(sampler_of(MODEL), parameters, [request])
    stop = f"{whole[8]} {whole[9]}"  # begins within a token's text, and ends within one
    assert as_text(whole).find(stop) == len(as_text(whole[:8]))
    asked = [dataclasses.replace(request, stop_strings=("nowhere", stop)), request]
    shown = {0: "", 1: ""}

    def on_text(index, text):
        shown[index] += text

    for tell in (None, on_text):
        answers = sorted(sampler_of(MODEL).run(parameters, asked, tell))
        cut = Completion(tuple(whole[:10]), as_text(whole[:8]), "stop")
        assert answers == [(0, cut), (1, Completion(tuple(whole), as_text(whole), "length"))]
    assert shown == {0: as_text(whole[:8]), 1: as_text(whole)}


def test_prompts_and_answers_are_held_to_the_context(parameters):
    requests = [Request([1] * n, max_new_tokens=50) for n in (20, 19, 21, 12)] + [
        Request([1], max_new_tokens=0)
    ]
    answers = completions(sampler_of(MODEL, context=20), parameters, requests)
    assert [(len(a.tokens), a.finish) for a in answers] == [
        (0, "too_long"), (1, "length"), (0, "too_long"), (8, "length"), (0, "length"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="request 1 has an empty prompt"):
        list(sampler_of(MODEL).run(parameters, [Request([1]), Request([])]))


def test_logits_that_are_not_finite_end_their_own_request_alone(parameters):
    """Nor do they reach the requests that come after in the same slot."""
    good = Request([3, 4, 5], max_new_tokens=20)
    (expected,) = tokens_of(sampler_of(MODEL), parameters, [good])
    assert 7 not in expected
    table = parameters["embedding"]["table"].at[7].set(jnp.nan)
    broken = {**parameters, "embedding": {"table": table}}
    bad = Request([7, *range(10, 40)], max_new_tokens=20)
    for slots in (1, 4):
        requests = [bad, good, good, bad, good]
        answers = completions(sampler_of(MODEL, slots=slots), broken, requests)
        assert [answer.finish for answer in answers] == [
            "not_finite", "length", "length", "not_finite", "length"
        ]  # fmt: skip
        assert [list(a.tokens) for a in answers] == [[], expected, expected, [], expected]


def test_a_run_like_the_one_before_compiles_nothing_and_each_batch_is_limited(
    parameters, monkeypatch
):
    traces, limits = [], watched_batches(monkeypatch)

    def bind(parameters):
        traces.append(1)
        return make_model(MODEL)(parameters)

    # Without drafts the slots become free together in both runs, and are refilled together.
    sampler = sampler_of(MODEL, bind, slots=4, draft_tokens=0)
    requests = [Request(p, max_new_tokens=20) for p in random_prompts((5, 9, 30, 41, 3, 8))]
    first = tokens_of(sampler, parameters, requests)
    count = len(traces)
    doubled = jax.tree.map(lambda x: 2 * x, parameters)
    others = [Request(p, max_new_tokens=22) for p in random_prompts((7, 12, 28, 40, 2, 1))]
    assert tokens_of(sampler, doubled, requests) != first
    assert len(tokens_of(sampler, parameters, others)[0]) == 22
    assert len(traces) == count
    assert len(limits) > 4
    assert set(limits) == {SECONDS}


def test_a_chat_that_grows_compiles_for_few_lengths_of_the_cache(parameters):
    traces = []

    def bind(parameters):
        traces.append(1)
        return make_model(MODEL)(parameters)

    # With drafts there would be two programs for each length.
    sampler = sampler_of(MODEL, bind, context=2048, draft_tokens=0)
    for length in (70, 110, 120):  # a prompt of 128, in a cache of 128 or 256
        tokens_of(
            sampler, parameters, [Request(p, max_new_tokens=60) for p in random_prompts((length,))]
        )
    count = len(traces)
    for length in (75, 101, 118):
        tokens_of(
            sampler, parameters, [Request(p, max_new_tokens=70) for p in random_prompts((length,))]
        )
    assert len(traces) == count


def test_a_prompt_is_never_wider_than_the_context(parameters, monkeypatch):
    widths = []

    prefill = decoding.prefill

    def watched(model, tokens, lengths):
        widths.append(tokens.shape[1])
        return prefill(model, tokens, lengths)

    monkeypatch.setattr(decoding, "prefill", watched)
    (answer,) = tokens_of(
        sampler_of(MODEL, context=150),
        parameters,
        [Request(p, max_new_tokens=9) for p in random_prompts((140,))],
    )
    assert len(answer) == 9
    assert widths == [150]


def test_the_size_of_the_cache_is_known_and_one_that_cannot_fit_is_refused(parameters, monkeypatch):
    # Keys and values x layers x slots x heads x tokens x width x bytes.
    expected = 2 * 2 * 6 * 2 * 500 * MODEL.head_dim
    settings = {"slots": 6, "context": 500}
    assert sampler_of(MODEL, **settings).cache_bytes == 4 * expected
    bf16 = make_model(MODEL, Compute(jnp.bfloat16))
    assert sampler_of(MODEL, bf16, **settings).cache_bytes == 2 * expected

    layers = 4 * sum(x.size for x in jax.tree.leaves(parameters["layers"]))
    # The cache, and beside it the next shorter one while it grows: 384 is 3 x 128.
    needed = layers + 4 * expected * (500 + 384) // 500

    class Device:
        def memory_stats(self):
            return {"bytes_limit": needed + 99, "bytes_in_use": 100}

        def __str__(self):
            return "device 0"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    sampler = sampler_of(MODEL, **settings)
    assert len(tokens_of(sampler, parameters, [Request([1], max_new_tokens=40)])[0]) == 40
    with pytest.raises(UserError, match=r"cache of 6 x 500 tokens .* device 0 has .* Lower"):
        list(sampler.run(parameters, [Request([1], max_new_tokens=600)] * 6))


def test_layers_taken_apart_give_the_same_tokens_and_are_held_once(parameters):
    requests = [Request(p, max_new_tokens=20) for p in random_prompts((5, 9, 30))]
    sampler = sampler_of(MODEL)
    expected = tokens_of(sampler, parameters, requests)
    own = jax.tree.map(jnp.copy, parameters)
    views = decoding.take_layers(MODEL, own, jnp.float32)
    assert all(stacked.is_deleted() for stacked in jax.tree.leaves(own["layers"]))
    assert tokens_of(sampler, views, requests) == expected
    assert "for the weights once more" in sampler.describe(parameters)
    assert "once more" not in sampler.describe(views)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_copy_of_the_weights_that_is_told_is_the_one_that_is_made(parameters, stored):
    """Outside the layers only what has another dtype than the computation is copied."""
    own = jax.tree.map(lambda p: p.astype(stored), parameters)
    sampler = sampler_of(MODEL, make_model(MODEL, Compute(jnp.bfloat16)))
    copied = own if stored == "float32" else own["layers"]
    size = filesize.decimal(2 * sum(p.size for p in jax.tree.leaves(copied)))
    assert sampler.describe(own).endswith(f", and {size} for the weights once more")


def test_the_last_answers_run_in_fewer_slots_and_their_tokens_are_the_same(parameters, monkeypatch):
    asked = zip(random_prompts((9, 30, 60, 70, 5, 80, 8, 65, 3)), (9, 70, 4, 8, 60, 3, 2, 5, 6),
                strict=True)  # fmt: skip
    requests = [Request(prompt, max_new_tokens=count) for prompt, count in asked]
    sampler = sampler_of(MODEL, slots=8)
    kept = []
    keep = sampler._keep

    def watched(cache, slots, rows):
        kept.append(len(rows))
        return keep(cache, slots, rows)

    monkeypatch.setattr(sampler, "_keep", watched)
    assert tokens_of(sampler, parameters, requests) == plain_greedy(MODEL, parameters, requests)
    assert kept == [2]


def test_the_longest_requests_go_first(parameters, monkeypatch):
    """Their prompts are then of similar length, so that the batches have little padding."""
    shapes = []
    prefill = decoding.prefill

    def watched(model, tokens, lengths):
        shapes.append((tokens.shape, lengths.tolist()))
        return prefill(model, tokens, lengths)

    monkeypatch.setattr(decoding, "prefill", watched)
    prompts = random_prompts((10, 100, 20, 98))
    requests = [Request(p, max_new_tokens=5) for p in prompts]
    answers = completions(sampler_of(MODEL, slots=2), parameters, requests)
    assert shapes == [((2, 128), [100, 98]), ((2, 64), [20, 10])]
    shapes.clear()
    # One long prompt does not widen the others, and three rows are not padded to four.
    prompts = random_prompts((10, 12, 110, 11))
    requests = [Request(p, max_new_tokens=5) for p in prompts]
    answers = completions(sampler_of(MODEL, slots=4), parameters, requests)
    assert shapes == [((1, 128), [110]), ((2, 64), [12, 11]), ((1, 64), [10])]
    assert [list(a.tokens) for a in answers] == plain_greedy(MODEL, parameters, requests)


def test_the_cache_that_is_told_is_the_one_that_is_made(parameters, monkeypatch):
    """With few and short requests it is far smaller than slots and context allow."""
    sampler = sampler_of(MODEL, slots=16, context=32_768)
    requests = [Request(p, max_new_tokens=150) for p in random_prompts((5, 60, 100))]
    made = []
    resize = sampler._resize

    def watched(cache, slots, length):
        made.append((length, cache.keys[0].shape[0]))
        return resize(cache, slots, length)

    monkeypatch.setattr(sampler, "_resize", watched)
    tokens_of(sampler, parameters, requests)
    assert max(made) == (256, 4)
    # Keys and values x layers x slots x heads x tokens x width x bytes.
    size = filesize.decimal(2 * 2 * 4 * 2 * 256 * MODEL.head_dim * 4)
    assert f"cache of 4 x 256 tokens: {size}," in sampler.describe(parameters, requests)


def bytes_as_text(ids):
    return bytes(ids).decode("utf-8", errors="replace")


@hypothesis_settings(deadline=None)
@example("añb", ["ñb"], [1])
@example("aab", ["ab", "b"], [3])
@given(
    st.text("aabñ€😀", max_size=12),
    st.lists(st.text("abñ", max_size=3), max_size=3),
    st.lists(st.integers(1, 5), max_size=20),
)
def test_what_is_shown_is_the_text_and_no_stop_string(text, stops, pieces):
    """Tokens are bytes, so characters come in parts; they arrive in groups of any size."""
    shown = []
    answer = TextStream(Request([0], stop_strings=tuple(stops)), bytes_as_text, shown.append)
    rest, stopped = list(text.encode()), False
    while rest and not stopped:
        count = pieces.pop() if pieces else 2
        stopped = answer.add(rest[:count])
        del rest[:count]
        assert text.startswith("".join(shown))
    found = [text.find(stop) + len(stop) for stop in stops if stop and stop in text]
    assert stopped == bool(found)
    expected = text[: min(found)] if found else text
    completion = answer.complete("stop" if stopped else "length")
    assert bytes(completion.tokens) == expected.encode()
    if found:
        expected = expected[: min(expected.find(s) for s in stops if s and s in expected)]
    assert completion.text == expected == "".join(shown)
    assert "" not in shown


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    shown = []
    answer = TextStream(Request([0]), bytes_as_text, shown.append)
    assert not answer.add([*b"ab", 0xE2, 0x82])
    assert shown == ["ab"]
    assert answer.complete("length").text == "ab\ufffd" == "".join(shown)
