"""Drafts against a slow search through the text."""

import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moi_jax.sampling.drafts import NGRAM, look_up

WIDTH, COUNT = 12, 4


def searched(text):
    """What followed the latest of the longest matches, as if the text went on repeating itself."""

    def matched(place):
        pairs = zip(text[place::-1], text[::-1], strict=False)
        same = [a == b for a, b in pairs][:NGRAM]
        return [*same, False].index(False)

    found = max(range(len(text) - 1), key=lambda place: (matched(place), place))
    text = list(text)
    for place in range(found + 1, found + 1 + COUNT):
        text.append(text[place])
    return text[-COUNT:]


@hypothesis_settings(deadline=None)
@example([[1, 2, 1, 2], [3, 3, 3, 1]], 0)
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=WIDTH), min_size=2, max_size=2),
       st.integers(0, 3))  # fmt: skip
def test_a_draft_is_what_followed_before(texts, noise):
    tokens = np.full((len(texts), WIDTH), noise, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = jnp.asarray([len(text) for text in texts])
    drafts = look_up(jnp.asarray(tokens), lengths, COUNT)
    assert drafts.tolist() == [searched(text) for text in texts]


def test_a_text_of_one_token_has_a_draft():
    assert look_up(jnp.asarray([[5, 0, 0]]), jnp.asarray([1]), 2).shape == (1, 2)
