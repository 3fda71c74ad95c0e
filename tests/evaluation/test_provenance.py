"""The digest of the parameters that results hold: of adapters, and where it is left out."""

import dataclasses
import hashlib
import json

import jax
import ml_dtypes
import pytest

from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.parameters import save_model, stored_parameters
from moi_jax.evaluation.evaluate import evaluate
from moi_jax.evaluation.options import BenchmarkOptions, EvaluationRequest, ModelOptions
from moi_jax.evaluation.provenance import parameters_digest
from moi_jax.models.parameters import parameter_specs

from support.adapters import save_adapters
from support.published import micro_published


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and adapters beside it."""
    folder = tmp_path_factory.mktemp("provenance")
    micro_published(folder / "Tiny", ml_dtypes.bfloat16, num_layers=1)
    import_checkpoint(folder / "Tiny", folder / "base")
    save_adapters(folder / "base", folder / "adapters")
    return folder


def digest(step):
    return parameters_digest(step, read_items(step))


def whole(place, path, factor):
    """A checkpoint with the base and the adapters, which are multiplied."""
    items = read_items(place / "adapters")
    adapters = stored_parameters(place / "adapters", items.model)
    base = stored_parameters(place / "base", items.model.base)
    stream = (
        (name, factor * adapters.get(name) if spec.adapter else base.get(name))
        for name, spec in parameter_specs(items.model).items()
    )
    save_model(path, stream, base.dtype, dataclasses.replace(items, base=None))
    return path


@pytest.mark.parametrize("verify", [True, False])
def test_results_of_adapters_beside_a_base_have_a_digest_unless_nothing_is_verified(
    place, tmp_path, caplog, verify
):
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    question = {"question": "How many are 1 and 2?", "answer": "#### 3"}
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text(json.dumps(question) + "\n")
    options = BenchmarkOptions(tmp_path / "data", tmp_path / "out", max_new_tokens=2)
    request = EvaluationRequest(
        place / "adapters", options, ("gsm8k",), model=ModelOptions(verify=verify)
    )
    with caplog.at_level("INFO"):
        made = evaluate(request, jax.devices()[:1]).results["tasks"]["gsm8k"]["run"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("hashing the parameters" in caplog.text) == verify
    assert made["values"] == (digest(place / "adapters") if verify else None)
    assert ("was not taken (--no-verify)" in page) == (not verify)


def test_a_digest_beside_a_base_is_that_of_the_adapters_and_the_fingerprint(place):
    items = read_items(place / "adapters")
    stored = stored_parameters(place / "adapters", items.model)
    hashes = {
        name: hashlib.sha256(stored.get(name).tobytes()).hexdigest() for name in stored.arrays
    }
    hashes["base"] = items.base.fingerprint
    listed = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    assert digest(place / "adapters") == hashlib.sha256(listed.encode()).hexdigest()


def test_other_adapters_have_another_digest_in_a_whole_checkpoint_too(place, tmp_path):
    found = {digest(whole(place, tmp_path / str(factor), factor)) for factor in (1, 2)}
    assert len(found | {digest(place / "base"), digest(place / "adapters")}) == 4
