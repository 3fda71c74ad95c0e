"""A cache in an object store: prepared once, used by every machine."""

import pytest

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.config.load import load_config
from moi_jax.data.cache import prepare as prepare_lib
from moi_jax.data.cache.writer import RECORDS

from support.runs import small_config


@pytest.fixture
def prepare(tmp_path):
    """Prepares the small config's data with a cache at a URL; returns the domains."""

    def run(url, work=prepare_lib.prepare, *shard):
        config = load_config(small_config(tmp_path), [f"data.cache_dir={url}"])
        experiment = open_experiment(config)
        return work(experiment.config.data, experiment.tokenizer, *shard)

    return run


def instructions(caches):
    return {
        cache.name: [instruction.tokens.tolist() for instruction in cache.read(range(5))]
        for cache in caches
    }


def test_a_second_machine_fetches_what_the_first_one_has_prepared(
    server, prepare, machine, log_text
):
    first = prepare(server.url("cache"))
    assert "chat: prepared" in log_text.getvalue()
    machine("second")
    log_text.truncate(0)
    second = prepare(server.url("cache"))
    assert "chat: cached" in log_text.getvalue()
    assert first[0].directory != second[0].directory
    assert instructions(first) == instructions(second)


def test_a_damaged_block_is_made_anew_and_replaced(s3, prepare, machine, log_text):
    first = prepare(s3.url("damaged"))
    block = first[0].blocks[0]
    name = f"damaged/blocks/{block.name}/{RECORDS}"
    whole = s3.get(name)
    s3.put(name, whole[:-9] + b"x" + whole[-8:])
    machine("second")
    assert instructions(prepare(s3.url("damaged"))) == instructions(first)
    assert f"{RECORDS} has changed since it was written) and is made anew" in log_text.getvalue()
    machine("third")
    log_text.truncate(0)
    assert instructions(prepare(s3.url("damaged"))) == instructions(first)
    assert "made anew" not in log_text.getvalue()


def test_the_shards_of_many_machines_are_put_together(s3, prepare, machine, log_text, monkeypatch):
    whole = prepare(s3.url("whole"))
    for shard in (1, 2):
        machine(f"shard {shard}")
        prepare(s3.url("shards"), prepare_lib.prepare_shard, shard, 2)
    machine("last")
    monkeypatch.setattr(prepare_lib, "run_work", None)  # nothing is left to render
    assert instructions(prepare(s3.url("shards"))) == instructions(whole)
