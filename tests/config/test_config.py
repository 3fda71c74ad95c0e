"""The config: strictness, strategies, overrides, and the resolved text of what is shipped."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moi_jax.cli.arguments import add_model
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config, make_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
GOLDEN = ROOT / "tests" / "golden" / "configs"

DOMAINS = [
    {"name": name, "prompt": f"You do {name}.", "sources": [{"path": f"{name}.jsonl"}]}
    for name in ("chat", "code", "maths")
]


WEIGHTED = [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]


def data(**switches):
    return {"data": {"domains": DOMAINS, **switches}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_resolved_text_of_every_shipped_config_is_frozen(path):
    """A change shows in review: `python tests/config/test_config.py` writes the texts anew."""
    frozen = GOLDEN / path.relative_to(ROOT / "configs")
    assert load_config(path).to_yaml() == frozen.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_resolved_text_resolves_to_itself(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        # Rows of the table in docs/method.md.
        ("sequence", ("per_domain", "proportional", "instruction", "none", 1)),
        ("packing", ("per_domain", "proportional", "row", "sequential", 1)),
        ("balance", ("per_domain", "balanced", "row", "best_fit", 3)),
        ("moi", ("per_domain", "balanced", "chunk", "best_fit", 3)),
    ],
)
def test_a_strategy_is_a_preset_over_the_switches(strategy, expected):
    d = make_config(data(strategy=strategy)).data
    assert (d.system_prompts, d.sampling, d.mask, d.packing, d.chunk_size) == expected


def test_a_switch_set_beside_the_strategy_wins():
    d = make_config(data(strategy="moi", mask="row", sampling="proportional", chunk_size=2)).data
    assert (d.mask, d.sampling, d.chunk_size, d.packing) == ("row", "proportional", 2, "best_fit")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dat": {}}, "unknown key 'dat' in the top level; did you mean 'data'?"),
        (
            {"data": {"sequence_lenght": 1}},
            "unknown key 'sequence_lenght' in data; did you mean 'sequence_length'?",
        ),
        (
            {"data": {"domains": [{"nam": "x"}]}},
            "unknown key 'nam' in data.domains.0; did you mean 'name'?",
        ),
        (
            {"data": {"domains": [{"name": "x", "sources": [{"path": "a", "wieght": 1}]}]}},
            "unknown key 'wieght' in data.domains.0.sources.0; did you mean 'weight'?",
        ),
        ({"data": {"held_out": {"fracton": 0.1}}}, "did you mean 'fraction'?"),
        (data(temperature=2.0), "temperature is refused with sampling: balanced, which does not"),
        (data(unit="loss_tokens"), "unit: loss_tokens is refused with sampling: balanced"),
        (
            data(domains=[{**DOMAINS[0], "weight": 2}], default_domain="chat"),
            "the weight of a domain is refused with sampling: balanced",
        ),
        (
            data(sampling="proportional", domains=[{"name": "chat", "sources": WEIGHTED}]),
            "the weight of a source is refused with sampling: proportional",
        ),
        (
            data(sampling="weights", domains=[{**DOMAINS[0], "weight": 0}]),
            "sampling: weights needs a domain with a weight over 0",
        ),
        (data(stages=[{"begins": 5}]), "stages begin at rows 5; the first must begin at 0"),
        (
            data(stages=[{"begins": 0}, {"begins": 9, "weights": {"talk": 1}}]),
            "stages give a weight to 'talk', which is not among the domains (chat, code, maths)",
        ),
        (
            data(stages=[{"begins": 0}, {"begins": 9}, {"begins": 9}]),
            "stages begin at rows 0, 9, 9",
        ),
        (
            {"data": {"domains": [{"name": "x", "sources": [{"path": "a", "tfds": "b"}]}]}},
            "a source has exactly one of path, tfds, hf",
        ),
        ({"eval": {"generate": {}}}, "unknown key 'generate' in eval; did you mean 'benchmarks'?"),
        (
            {"train": {"early_stopping_patience": 3}, "eval": {"every": 0}},
            "train.early_stopping_patience counts held-out evaluations, and eval.every 0",
        ),
        ({"train": {"early_stopping_patience": 0}}, "train.early_stopping_patience: Input should"),
        ({"train": {"profile_steps": [5, 3]}}, "profile_steps [5, 3] ends before it begins"),
        ({"train": {"profile_steps": [0, 3]}}, "train.profile_steps.0: Input should be greater"),
        ({"train": {"profile_steps": [3]}}, "train.profile_steps"),
        (
            {"model": {"attention": "flash"}},
            "'splash' or 'mosaic_gpu' (got 'flash')",
        ),
        (
            {"model": {"splash_blocks": {"q": 100}}},
            "model.splash_blocks.q: Input should be a multiple of 128 (got 100)",
        ),
        (
            {"model": {"splash_blocks": {"kv": 512, "kv_compute": 384}}},
            "model.splash_blocks: kv 512 is not a multiple of kv_compute 384",
        ),
        (
            {"model": {"compute_dtype": "fp16"}},
            "model.compute_dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float64' (got",
        ),
        ({"train": {"steps": 1, "epochs": 2}}, "exactly one of steps, epochs, loss_tokens"),
        (data(chunk_size=2), "chunk_size 2 is refused with sampling: balanced"),
        (
            data(sampling="proportional", epoch_end="shortest"),
            "epoch_end: shortest is refused with sampling: proportional",
        ),
        (
            {"checkpoint": {"best_metric": "eval/loss"}, **data()},
            "checkpoint.best_metric 'eval/loss' is never measured; use one of eval/chat/loss",
        ),
        (data(default_domain="talk"), "default_domain 'talk' is not among the domains"),
        ({"data": {"domains": DOMAINS + DOMAINS[:1]}}, "two domains are named chat"),
        (
            {"data": {"domains": [{**DOMAINS[0], "prompt": "Be kind.<|im_end|>"}]}},
            "the system prompt of chat holds the control token <|im_end|>; a prompt is plain text",
        ),
        ({"train": {"global_batch_rows": 6, "microbatch_rows": 4}}, "is not a multiple of"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate: Input should be a"),
        ({"data": {"strategy": ["moi"]}}, "data.strategy: Input should be 'sequence'"),
        ({"data": 3}, "data: Input should be a valid dictionary"),
        ({"eval": False}, "eval: Input should be a valid dictionary"),
        ({"logging": []}, "logging: Input should be a valid dictionary"),
        ({"train": {"steps": True}}, "train.steps: Input should be a valid integer"),
        ({"train": {"sample_prompts": [{"domain": "x", "prompt": "y"}]}}, "names the domain 'x'"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(values, message):
    with pytest.raises(UserError) as error:
        make_config(values, where="my.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("my.yaml: ")
    assert "\n" not in str(error.value)


def test_a_dtype_may_be_written_short_and_is_shown_in_full():
    model = {"param_dtype": "fp32", "compute_dtype": "bf16"}
    config = make_config({"model": model, "optimizer": {"moment_dtype": "f64"}})
    resolved = yaml.safe_load(config.to_yaml())
    assert resolved["model"]["param_dtype"] == "float32"
    assert resolved["model"]["compute_dtype"] == "bfloat16"
    assert resolved["optimizer"]["moment_dtype"] == "float64"


@pytest.mark.parametrize(("short", "full"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_a_command_takes_a_short_dtype(short, full):
    parser = argparse.ArgumentParser()
    add_model(parser.add_argument_group())
    assert parser.parse_args(["--dtype", short]).dtype == full


def test_overrides_reach_sections_and_list_elements(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {domains: [{name: chat, sources: [{path: a}]}]}\ntrain: {epochs: 2}\n")
    overrides = ["data.domains.0.prompt='Hello: there'", "optimizer.learning_rate=1e-3"]
    config = load_config(path, [*overrides, "train.epochs=null", "train.steps=7"])
    assert config.data.domains[0].prompt == "Hello: there"
    assert config.optimizer.learning_rate == 1e-3
    assert (config.train.steps, config.train.epochs) == (7, None)


@pytest.mark.parametrize(
    "override",
    ["train.steps", "steps=3", "data.domains.5.name=x", "a.b.c=1", "a.b=[1", "a.b=2024-99-99"],
)
def test_a_bad_override_is_named(tmp_path, override):
    path = tmp_path / "c.yaml"
    path.write_text("data: {domains: []}\n")
    with pytest.raises(UserError):
        load_config(path, [override])


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 1, steps: 2}\n")
    with pytest.raises(UserError, match="'steps' is given twice"):
        load_config(path)


@pytest.mark.parametrize("text", ["train: {steps: 2024-99-99}\n", "a: " + "[" * 3000, "a: [\n"])
def test_what_is_no_yaml_is_one_line(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="is not valid YAML") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_a_section_may_be_merged_from_an_anchor(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "data:\n  domains:\n  - {name: chat, sources: [&s {path: a, max_rows: 3}]}\n"
        "  - {name: code, sources: [{<<: *s, path: b}]}\n"
    )
    source = load_config(path).data.domains[1].sources[0]
    assert (source.path, source.max_rows) == ("b", 3)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moi_jax.train", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_a_users_mistake_exits_with_2_and_one_line():
    done = run("--config", "configs/quickstart.yaml", "train.stesp=3")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: configs/quickstart.yaml: unknown key 'stesp' in train; did you mean 'steps'?"
    )


def test_print_config_and_help_import_no_jax():
    code = (
        "import sys, runpy; sys.argv = ['train', *sys.argv[1:]]\n"
        "try: runpy.run_module('moi_jax.train', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'jax', 'flax', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in (["--help"], ["--config", "configs/quickstart.yaml", "--print-config"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    for path in CONFIGS:
        frozen = GOLDEN / path.relative_to(ROOT / "configs")
        frozen.parent.mkdir(parents=True, exist_ok=True)
        frozen.write_text(load_config(path).to_yaml(), encoding="utf-8")
