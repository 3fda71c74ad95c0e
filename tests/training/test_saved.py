"""What a run resumes from: a checkpoint, or a newer step of the local copies."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from moi_jax.common.errors import UserError
from moi_jax.training.saved import newest_saved


@pytest.mark.parametrize(("steps", "logged"), [((5, 6, 7), 7), ((), -1)])
def test_a_local_step_that_the_metrics_do_not_reach_is_not_asked_for(tmp_path, steps, logged):
    lines = "".join(json.dumps({"step": step}) + "\n" for step in steps)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 8, "lo', encoding="utf-8")
    checkpoints = SimpleNamespace(
        directory=tmp_path / "checkpoints", latest=lambda: None, items=SimpleNamespace(model=None)
    )
    asked = []

    def newest(after, logged, held):
        asked.append((after, logged, held(False)))

    local = SimpleNamespace(newest=newest)
    assert newest_saved(checkpoints, local, ("parameters", "optimizer")) is None
    assert asked == [(0, logged, ("parameters", "optimizer"))]


def test_a_local_step_that_is_not_finite_names_the_way_back_to_the_checkpoint(tmp_path):
    checkpoints = SimpleNamespace(
        directory=tmp_path / "checkpoints", latest=lambda: 5, items=SimpleNamespace(model=None)
    )
    copy = SimpleNamespace(
        step=7, path=tmp_path / "disk" / "7.a", base=None, record={"position": {}, "config": {}}
    )
    local = SimpleNamespace(
        newest=lambda *_: copy, restore=lambda *_: ({"kernel": jnp.full(2, jnp.nan)}, ())
    )
    saved = newest_saved(checkpoints, local, ("parameters", "optimizer"))
    with pytest.raises(UserError) as error:
        saved.restore()
    assert "state/0.kernel has values that are NaN or infinite" in str(error.value)
    assert f"when {tmp_path / 'disk'}, the local copies, is removed on all hosts" in str(
        error.value
    )
    assert "moved elsewhere" not in str(error.value)
