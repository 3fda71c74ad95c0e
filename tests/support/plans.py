"""Corpora and data sections for the tests of planner and loader."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import reject, settings
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.config import Data
from moi_jax.config.load import make_config
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import EpochPlan, plan_epoch

# Tests measure no time: a busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

NAMES = ("chat", "code", "maths", "tools", "law", "poetry")
SAMPLINGS = ("balanced", "proportional", "weights", "temperature")

# Groups of four instructions of at most 16 tokens always fit; longer ones may be left out.
LENGTH = 64


def data_section(
    domains: int,
    sequence_length: int = 64,
    weights: Sequence[float] = (),
    sources: Sequence[Sequence[float]] = (),
    **switches: Any,
) -> Data:
    """The resolved data section of so many domains, the default domain second where it can be.

    `weights` are the domains', `sources` those of each domain's sources.
    """
    names = NAMES[:domains]
    weights = weights or (1.0,) * domains
    sources = sources or ((1.0,),) * domains
    section = {
        "default_domain": names[min(1, domains - 1)],
        "sequence_length": sequence_length,
        "domains": [
            {"name": n, "weight": w, "sources": [{"path": n, "weight": s} for s in of_source]}
            for n, w, of_source in zip(names, weights, sources, strict=True)
        ],
        **switches,
    }
    return make_config({"data": section}).data


def corpus_of(lengths: list[list[int]], source_starts: list[list[int]] | None = None) -> Corpus:
    """A corpus of instructions of these lengths, about half of whose tokens carry loss."""
    arrays = [np.array(domain, np.int32) for domain in lengths]
    starts = source_starts and [np.array(domain) for domain in source_starts]
    losses = [(domain + 1) // 2 for domain in arrays]
    return Corpus.of(NAMES[: len(lengths)], arrays, losses, starts)


@st.composite
def corpora(draw: st.DrawFn, longest: int = 40) -> Corpus:
    """One to four domains of 1 to 25 instructions of 2 to `longest` tokens, more of them short."""
    length = st.integers(2, min(longest, 16)) | st.integers(2, longest)
    domain = st.lists(length, min_size=1, max_size=25)
    return corpus_of(draw(st.lists(domain, min_size=1, max_size=4)))


def plan_or_reject(corpus: Corpus, data: Data, seed: int = 0, epoch: int = 0) -> EpochPlan:
    """The plan, where some group fits a row; else the example is none for the test."""
    try:
        return plan_epoch(corpus, data, seed, epoch)
    except UserError:
        reject()


@st.composite
def switches(draw: st.DrawFn, samplings: Sequence[str] = SAMPLINGS) -> dict[str, Any]:
    """Any value of every switch that planning reads."""
    sampling = draw(st.sampled_from(samplings))
    chosen: dict[str, Any] = {
        "sampling": sampling,
        "order": draw(st.sampled_from(["default_first", "config", "shuffled"])),
        "packing": draw(st.sampled_from(["best_fit", "sequential", "none"])),
    }
    if sampling != "balanced":
        chosen["chunk_size"] = draw(st.integers(1, 4))
    if sampling != "proportional":
        chosen["epoch_end"] = draw(st.sampled_from(["longest", "shortest"]))
    if sampling == "temperature":
        chosen["temperature"] = draw(st.sampled_from([0.5, 1.0, 3.0]))
    if sampling in ("weights", "temperature"):
        chosen["unit"] = draw(st.sampled_from(["instructions", "loss_tokens"]))
    return chosen


@st.composite
def groups(draw: st.DrawFn, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Members int64[G, W] out of few instructions, so that many occur twice, and sizes."""
    width = draw(st.integers(1, 3))
    instructions = draw(st.sampled_from([3, 12, 1000]))
    count = draw(st.integers(1, 40))
    member = st.integers(0, instructions - 1)
    group = st.lists(member, min_size=width, max_size=width, unique=True)
    members = draw(st.lists(group, min_size=count, max_size=count))
    sizes = draw(st.lists(st.integers(1, capacity), min_size=count, max_size=count))
    members = np.array(members)
    if width == 1:  # copies of an instruction have one length
        sizes = [sizes[members[:, 0].tolist().index(member)] for member in members[:, 0]]
    if draw(st.booleans()):
        members[-1, 1:] = -1
    return members, np.array(sizes)


def rows_of(plan: EpochPlan) -> list[list[list[int]]]:
    return [[group.tolist() for group in plan.row(row)] for row in range(plan.rows)]


def assert_same(a: EpochPlan, b: EpochPlan) -> None:
    for field in ("instructions", "group_starts", "row_starts"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
