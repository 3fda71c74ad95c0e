"""Rows as arrays, against a row built token by token; batches, against the endless sequence."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moi_jax.config import HeldOut, Loss, Train
from moi_jax.config.load import make_config
from moi_jax.data import loader
from moi_jax.data.cache.prepare import prepare
from moi_jax.data.cache.selection import select
from moi_jax.data.loader import Batch, BatchReader, PackedInstruction, assemble, batch_dataset
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.training_plan import TrainingPlan
from moi_jax.text.instructions import TARGETS, Instruction, label_mask
from moi_jax.text.tokenizer import load_tokenizer

from support.plans import NAMES, data_section

PAD = 9
SAMPLES = Path(loader.__file__).parent / "samples"


def instruction(tokens: list[int], spans: list[tuple[int, int, int]]) -> Instruction:
    return Instruction(
        np.array(tokens, np.int32), 0, np.array(spans, np.int32).reshape(-1, 3), row_system=""
    )


@st.composite
def placed(draw: st.DrawFn) -> PackedInstruction:
    length = draw(st.integers(2, 6))
    start = draw(st.integers(0, length - 1))  # a label at token 0 is ignored
    spans = [(start, draw(st.integers(start + 1, length)), draw(st.integers(1, 3)))]
    tokens = draw(st.lists(st.integers(10, 99), min_size=length, max_size=length))
    weight = draw(st.sampled_from([1.0, 0.5, 3.0]))
    return PackedInstruction(instruction(tokens, spans), draw(st.integers(0, 3)), weight)


def plain_row(
    row: list[list[PackedInstruction]], length: int, mask: str, targets: str
) -> list[list]:
    """tokens, targets, segment_ids, positions, domain_ids, loss_weights of a row, one by one."""
    columns, segment, position = [], 0, 0
    for group_number, group in enumerate(row):
        for number, (item, domain, weight) in enumerate(group):
            opens = {"chunk": number == 0, "row": group_number == number == 0, "instruction": True}
            if opens[mask]:
                segment, position = segment + 1, 0
            labels = label_mask(item, targets)
            for at, token in enumerate(item.tokens):
                last = at == len(item.tokens) - 1
                target = PAD if last else item.tokens[at + 1]
                carries = 0 if last or not labels[at + 1] else weight
                columns.append((token, target, segment, position, domain, carries))
                position += 1
    columns += [(PAD, PAD, 0, 0, -1, 0)] * (length - len(columns))
    return [list(column) for column in zip(*columns, strict=True)]


def plain_batch(rows: list, length: int, mask: str, targets: str) -> Batch:
    built = [plain_row(row, length, mask, targets) for row in rows]
    return Batch(*(np.array(column) for column in zip(*built, strict=True)))


def assert_equal(batch: Batch, expected: Batch) -> None:
    for name, array, wanted in zip(Batch._fields, batch, expected, strict=True):
        np.testing.assert_array_equal(array, wanted.astype(array.dtype), err_msg=name)


def test_the_arrays_are_those_of_the_docstring():
    chat = PackedInstruction(instruction([11, 12, 13, 14], [(2, 4, 3)]), 0, 1.0)
    code = [PackedInstruction(instruction([t, t + 1], [(1, 2, 3)]), 1, 1.0) for t in (21, 31)]
    batch = assemble([[[chat], code]], 10, PAD, "chunk", "assistant")
    for name, array in batch._asdict().items():
        shown = Batch.__doc__.split(f"        {name} ")[1].split("\n")[0].split("   ")
        assert array[0].tolist() == [float(n) for n in " ".join(shown).split()[:10]]
    for mask in ("row", "instruction"):
        line = Batch.__doc__.split(f"With mask {mask}: segment_ids ")[1].split(".")[0]
        segment_ids, positions = line.split(", positions ")
        batch = assemble([[[chat], code]], 10, PAD, mask, "assistant")
        assert batch.segment_ids[0].tolist() == [int(n) for n in segment_ids.split()]
        assert batch.positions[0].tolist() == [int(n) for n in positions.split()]


@given(
    st.lists(st.lists(st.lists(placed(), min_size=1, max_size=3), max_size=3), max_size=4),
    st.sampled_from(["chunk", "row", "instruction"]),
    st.sampled_from(["assistant", "qwen_official"]),
)
def test_rows_equal_those_built_token_by_token(rows, mask, targets):
    rows = [*rows, []]  # an empty row, too
    batch = assemble(rows, 54, PAD, mask, targets)
    assert_equal(batch, plain_batch(rows, 54, mask, targets))
    assert [array.dtype for array in batch] == [np.int32] * 5 + [np.float32]


@given(st.lists(placed(), min_size=1, max_size=6))
def test_no_target_crosses_the_end_of_an_instruction(items):
    batch = assemble([[items]], 40, PAD, "row", "qwen_official")
    ends = np.cumsum([len(item.instruction.tokens) for item in items])
    assert (batch.targets[0, ends - 1] == PAD).all()
    assert (batch.loss_weights[0, ends - 1] == 0).all()
    assert np.count_nonzero(batch.loss_weights) == sum(
        np.count_nonzero(label_mask(item.instruction, "qwen_official")[1:]) for item in items
    )


# --- rows of a run ---


class MemoryCache:
    """Stands in for a domain's cache on disk and counts the reads."""

    def __init__(self, instructions: list[Instruction]):
        self.instructions, self.reads = instructions, 0

    def read(self, indices) -> list[Instruction]:
        self.reads += 1
        return [self.instructions[i] for i in indices]


def small_domains(rng: np.random.Generator, counts: list[int]) -> list[list[Instruction]]:
    """Instructions of 3 to 16 tokens, each with labels of both kinds."""
    domains = []
    for count in counts:
        items = []
        for length in rng.integers(3, 17, count).tolist():
            cut = int(rng.integers(2, length))
            spans = [(1, cut, 2), (cut, length, 3)]
            items.append(instruction(rng.integers(10, 1000, length).tolist(), spans))
        domains.append(items)
    return domains


def reader_of(
    domains: list[list[Instruction]], data, loss: Loss, train: Train
) -> tuple[BatchReader, list[MemoryCache]]:
    """A reader whose caches hold the training instructions in reverse, after one held out."""
    held = instruction([5, 5], [(1, 2, 3)])
    caches = [MemoryCache([held, *reversed(items)]) for items in domains]
    records = [np.arange(len(items), 0, -1) for items in domains]
    corpus = Corpus.of(
        NAMES[: len(domains)],
        [np.array([len(i.tokens) for i in items]) for items in domains],
        [np.array([label_mask(i, loss.targets).sum() for i in items]) for items in domains],
    )
    return BatchReader(TrainingPlan(corpus, data, train), caches, records, loss, PAD), caches


def plain_weight(reader: BatchReader, plan, number: int) -> float:
    """The weight of each label of an instruction, by the words of docs/method.md."""
    corpus, normalization = plan.corpus, reader.loss.normalization
    if normalization == "token":
        return 1.0
    if normalization == "instruction":
        return 1 / corpus.loss_lengths[number]
    sums = [0] * len(corpus.names)
    for i in plan.instructions:
        sums[int(corpus.domain_of(i))] += int(corpus.loss_lengths[i])
    present = [s for s in sums if s]
    return sum(present) / (len(present) * sums[int(corpus.domain_of(np.int64(number)))])


GRID = list(
    product(
        [("balanced", None), ("proportional", 1), ("proportional", 3), ("weights", 2)],
        ["default_first", "config", "shuffled"],
        ["chunk", "row", "instruction"],
        ["best_fit", "sequential", "none"],
    )
)


@pytest.mark.parametrize(("sampling", "order", "mask", "packing"), GRID)
def test_every_combination_of_switches_gives_the_rows_of_its_plan(sampling, order, mask, packing):
    domains = small_domains(np.random.default_rng(0), [7, 4, 2])
    ends = ["longest"] if sampling[0] == "proportional" else ["longest", "shortest"]
    for epoch_end, normalization, targets in product(
        ends, ["token", "instruction", "domain"], TARGETS
    ):
        data = data_section(
            3,
            64,
            sampling=sampling[0],
            chunk_size=sampling[1],
            order=order,
            mask=mask,
            packing=packing,
            epoch_end=epoch_end,
        )
        loss = Loss(normalization=normalization, targets=targets)
        reader, _ = reader_of(domains, data, loss, Train(epochs=1, global_batch_rows=4))
        run, plan = reader.plan, reader.plan.epoch_plan(0)
        flat = [item for items in domains for item in items]
        weights = [plain_weight(reader, plan, number) for number in range(len(flat))]
        rows = [
            [
                [
                    PackedInstruction(flat[i], int(run.corpus.domain_of(i)), weights[i])
                    for i in group
                ]
                for group in plan.row(row)
            ]
            for row in range(plan.rows)
        ]
        batch = reader.read(range(plan.rows))
        assert_equal(batch, plain_batch(rows, 64, mask, targets))


def epoch_weights(normalization: str) -> tuple[Batch, BatchReader]:
    """All rows of an epoch, with one segment an instruction."""
    domains = small_domains(np.random.default_rng(1), [9, 5, 3])
    data, loss = data_section(3, 64, mask="instruction"), Loss(normalization=normalization)
    reader, _ = reader_of(domains, data, loss, Train(epochs=1, global_batch_rows=4))
    return reader.read(range(reader.plan.total_rows)), reader


def test_token_weights_sum_to_the_loss_tokens_of_the_epoch():
    batch, reader = epoch_weights("token")
    assert batch.loss_weights.sum() == reader.plan.epoch_plan(0).loss_tokens


def test_instruction_weights_sum_to_one_in_every_instruction():
    batch, reader = epoch_weights("instruction")
    sums = [
        weights[ids == segment].sum()
        for weights, ids in zip(batch.loss_weights, batch.segment_ids, strict=True)
        for segment in range(1, ids.max() + 1)
    ]
    assert len(sums) == len(reader.plan.epoch_plan(0).instructions)
    np.testing.assert_allclose(sums, 1, rtol=1e-6)


def test_domain_weights_sum_to_the_same_for_every_domain_over_an_epoch():
    batch, reader = epoch_weights("domain")
    sums = [batch.loss_weights[batch.domain_ids == domain].sum() for domain in range(3)]
    np.testing.assert_allclose(sums, reader.plan.epoch_plan(0).loss_tokens / 3, rtol=1e-5)


def run_reader(train: Train, **loss) -> tuple[BatchReader, list[MemoryCache]]:
    domains = small_domains(np.random.default_rng(2), [23, 11])
    return reader_of(domains, data_section(2, 64), Loss(**loss), train)


@pytest.mark.parametrize("start", [0, 4, 7, 20])
def test_batches_from_any_row_are_slices_of_the_endless_sequence(start):
    reader, _ = run_reader(Train(epochs=4, global_batch_rows=4))
    total = reader.plan.total_rows
    whole = reader.read(range(total))
    batches = list(batch_dataset(reader, start))
    assert len(batches) == -(-(total - start) // 4)
    for number, batch in enumerate(batches):
        for array, sequence in zip(batch, whole, strict=True):
            assert array.shape[0] == 4
            rows = sequence[start + 4 * number : start + 4 * number + 4]
            np.testing.assert_array_equal(array[: len(rows)], rows)


def test_only_the_last_batch_of_a_run_has_empty_rows_and_they_weigh_nothing():
    reader, _ = run_reader(Train(epochs=1, global_batch_rows=5))
    empty = reader.plan.empty_rows
    assert empty == 5 - reader.plan.total_rows % 5
    *full, last = list(batch_dataset(reader))
    assert all((batch.segment_ids[:, 0] == 1).all() for batch in full)
    assert (last.segment_ids[:-empty, 0] == 1).all()
    assert_equal(Batch(*(a[-empty:] for a in last)), plain_batch([[]] * empty, 64, "chunk", "-"))


def test_a_run_of_steps_ends_with_a_full_batch():
    reader, _ = run_reader(Train(steps=9, global_batch_rows=5))
    batches = list(batch_dataset(reader))
    assert len(batches) == 9
    assert all((batch.segment_ids[:, 0] == 1).all() for batch in batches)


def test_the_rows_of_a_host_are_a_part_of_the_global_batch():
    reader, _ = run_reader(Train(steps=5, global_batch_rows=6))
    local = np.array([1, 4])
    for part, whole in zip(
        batch_dataset(reader, local_rows=local), batch_dataset(reader), strict=True
    ):
        assert_equal(part, Batch(*(array[local] for array in whole)))


def test_a_batch_is_one_read_a_domain():
    reader, caches = run_reader(Train(steps=5, global_batch_rows=6))
    reader.read(range(6))
    assert [cache.reads for cache in caches] == [1, 1]


def test_the_position_in_the_stream_can_be_saved_and_restored():
    reader, _ = run_reader(Train(epochs=4, global_batch_rows=4))
    iterator = iter(batch_dataset(reader))
    next(iterator)
    state = iterator.get_state()
    expected = next(iterator)
    again = iter(batch_dataset(reader))
    again.set_state(state)
    assert_equal(next(again), expected)


# --- the real thing ---


@pytest.mark.parametrize("targets", list(TARGETS))
def test_the_shipped_samples_stream_from_their_cache(tmp_path, targets):
    names = ("chat", "code", "maths", "tools")
    config = make_config(
        {
            "data": {
                "root": str(SAMPLES),
                "cache_dir": str(tmp_path),
                "default_system_prompt": "You are a helpful assistant.",
                "sequence_length": 2048,
                "domains": [{"name": n, "sources": [{"path": f"{n}.jsonl"}]} for n in names],
            },
            "loss": {"targets": targets},
            "train": {"epochs": 1, "global_batch_rows": 2},
        }
    )
    tokenizer = load_tokenizer(SAMPLES / "tokenizer")
    caches = prepare(config.data, tokenizer)
    selections = select(caches, HeldOut(), targets)
    corpus = Corpus.of_training(caches, selections, targets)
    run = TrainingPlan(corpus, config.data, config.train)
    reader = BatchReader(
        run, caches, [s.train for s in selections], config.loss, tokenizer.template.pad
    )
    plan = run.epoch_plan(0)
    tokens = weights = 0
    for number, batch in enumerate(batch_dataset(reader)):
        tokens += np.count_nonzero(batch.segment_ids)
        weights += batch.loss_weights.sum()
        if number == 0:
            first = np.concatenate(
                [
                    caches[d].read([selections[d].train[i - corpus.offsets[d]]])[0].tokens
                    for group in plan.row(0)
                    for i, d in zip(group, corpus.domain_of(group), strict=True)
                ]
            )
            np.testing.assert_array_equal(batch.tokens[0, : len(first)], first)
            assert (batch.tokens[0, len(first) :] == tokenizer.template.pad).all()
            assert tokenizer.decode(first[:20].tolist()).startswith("<|im_start|>system")
    assert tokens == plan.tokens
    assert weights == plan.loss_tokens
