"""metrics.prom, read back by the parser of Prometheus' own Python library."""

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config
from moi_jax.training.goodput import Clock
from moi_jax.training.metrics import MetricsLog

from support.runs import small_config


@pytest.fixture
def log(tmp_path):
    (tmp_path / 'a "run"').mkdir()
    return MetricsLog(tmp_path / 'a "run"', ["prometheus"], -1, Clock())


def written(tmp_path):
    """(metric, NAME) -> value, by the parser."""
    text = (tmp_path / 'a "run"' / "metrics.prom").read_text()
    families = list(text_string_to_metric_families(text))
    assert all(family.type == "gauge" and family.documentation for family in families)
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {'a "run"'}
    return {(s.name, s.labels.get("name")): s.value for s in samples}


def test_every_figure_is_a_gauge_and_domains_are_labels(log, tmp_path):
    log.write({"step": 3, "loss": 1.5, "domain/a-b/loss": 1.0, "domain/a_b/loss": math.nan})
    found = written(tmp_path)
    assert found["moi_jax_step", None] == 3
    assert found["moi_jax_loss", None] == 1.5
    assert found["moi_jax_domain_loss", "a-b"] == 1.0
    assert math.isnan(found["moi_jax_domain_loss", "a_b"])
    assert found["moi_jax_time", "start"] >= 0


def test_the_newest_value_of_each_figure_stays(log, tmp_path):
    log.write({"step": 4, "skipped": True, "reason": "not finite", "loss": math.inf})
    assert written(tmp_path)["moi_jax_skipped", None] == 1
    log.write({"step": 4, "eval/mean/default_prompt/loss": 2.5})
    log.write({"step": 5, "loss": 1.25})
    found = written(tmp_path)
    assert found["moi_jax_eval_default_prompt_loss", "mean"] == 2.5
    assert found["moi_jax_loss", None] == 1.25
    assert found["moi_jax_skipped", None] == 0
    assert [path.name for path in (tmp_path / 'a "run"').glob("*.prom*")] == ["metrics.prom"]


def test_the_config_takes_the_tracker(tmp_path):
    path = small_config(tmp_path)
    config = load_config(path, ["logging.trackers=[prometheus]"])
    assert config.logging.trackers == ("prometheus",)
    with pytest.raises(UserError, match="trackers"):
        load_config(path, ["logging.trackers=[statsd]"])
