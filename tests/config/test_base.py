"""`base:` of a config file: what is merged how, and every mistake with it."""

import copy

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.config.files import merge
from moi_jax.config.load import load_config

from support.runs import ROOT, train_command

PLAIN = {"data": {"sequence_length": 64, "held_out": {"fraction": 0.1}}, "train": {"epochs": 2}}


def write(directory, **files):
    """Writes NAME.yaml of each mapping, and returns the path of the first one."""
    for name, values in files.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return directory / f"{next(iter(files))}.yaml"


@pytest.mark.parametrize(
    ("above", "expected"),
    [
        ({}, {}),
        ({"train": {"seed": 3}}, {"train.seed": 3, "train.epochs": 2}),
        ({"train": {"epochs": None, "steps": 7}}, {"train.epochs": None, "train.steps": 7}),
        ({"train": None, "data": {}}, {"train.epochs": 2, "data.sequence_length": 64}),
        ({"data": {"held_out": {"min": 1}}}, {"data.held_out.min": 1, "data.sequence_length": 64}),
        ({"optimizer": {"b1": 0.5}}, {"optimizer.b1": 0.5}),
    ],
)
def test_a_file_changes_what_it_names_and_keeps_the_rest_of_its_base(tmp_path, above, expected):
    config = load_config(write(tmp_path, above={"base": "plain.yaml", **above}, plain=PLAIN))
    for key, value in {"data.held_out.fraction": 0.1, **expected}.items():
        found = config
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value, key


def test_a_list_replaces_the_list_of_the_base(tmp_path):
    domains = [{"name": name, "sources": [{"path": name}]} for name in ("chat", "code", "maths")]
    path = write(
        tmp_path,
        above={"base": "plain.yaml", "data": {"domains": domains[:1]}},
        plain={"data": {"domains": domains}},
    )
    assert [domain.name for domain in load_config(path).data.domains] == ["chat"]


def test_a_base_has_a_base_and_its_path_starts_at_its_own_file(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", middle={"base": "../root.yaml", "train": {"seed": 2, "epochs": 5}})
    path = write(
        tmp_path,
        top={"base": "deep/middle.yaml", "train": {"seed": 3}},
        root={"loss": None, **PLAIN},
    )
    monkeypatch.chdir("/")
    config = load_config(path)
    assert (config.train.seed, config.train.epochs, config.data.sequence_length) == (3, 5, 64)


def test_the_command_line_wins_over_file_and_base(tmp_path):
    path = write(tmp_path, above={"base": "plain.yaml", "train": {"epochs": 3}}, plain=PLAIN)
    assert load_config(path, ["train.epochs=4"]).train.epochs == 4


def test_the_resolved_text_stands_alone(tmp_path):
    config = load_config(write(tmp_path, above={"base": "plain.yaml"}, plain=PLAIN))
    assert "base" not in yaml.safe_load(config.to_yaml())
    (tmp_path / "alone").mkdir()
    again = tmp_path / "alone" / "config.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": {"base": "a.yaml"}}, "the bases of {0}/a.yaml form a circle: {0}/a.yaml -> {0}/a"),
        (
            {"a": {"base": "b.yaml"}, "b": {"base": "../{1}/a.yaml"}},
            "the bases of {0}/a.yaml form a circle: {0}/a.yaml -> {0}/b.yaml -> {0}/../{1}/a.yaml",
        ),
        (
            {"a": {"base": "b.yaml"}},
            "cannot read the base {0}/b.yaml of {0}/a.yaml: No such file or directory",
        ),
        ({"a": {"base": "b.yaml"}, "b": [1]}, "{0}/b.yaml must hold sections such as 'data:'"),
        ({"a": {"base": None}}, "{0}/a.yaml: base must be the path of another config file, found"),
        ({"a": {"base": ["b.yaml"]}}, "base must be the path of another config file, found ['b."),
        (
            {"a": {"base": "b.yaml"}, "b": {"train": {"stesp": 1}}},
            "{0}/a.yaml over {0}/b.yaml: unknown key 'stesp' in train; did you mean 'steps'?",
        ),
        ({"a": {"bas": "b.yaml"}}, "unknown key 'bas' in the top level; did you mean 'base'?"),
        (
            {"a": {"base": "b.yaml", "train": {"steps": 3}}, "b": PLAIN},
            "steps and epochs are set together",
        ),
    ],
)
def test_a_mistake_with_a_base_is_one_line(tmp_path, files, message):
    text = yaml.safe_dump(files).replace("{1}", tmp_path.name)
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, **yaml.safe_load(text)))
    assert message.format(tmp_path, tmp_path.name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_base_exits_with_2(tmp_path):
    done = train_command(write(tmp_path, a={"base": "b.yaml"}))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"cannot read the base {tmp_path}/b.yaml" in done.stderr


def test_every_ablation_is_one_step_over_moi():
    """Besides its base, its run directory and one switch (with that switch's own setting)."""
    for path in (ROOT / "configs" / "ablations").glob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem != "moi":
            assert values.pop("base") == "moi.yaml"
            assert values.pop("logging") == {"run_dir": f"runs/ablations/{path.stem}"}
            assert len(values) == 1, path


LEAVES = st.none() | st.integers() | st.lists(st.integers(), max_size=2)
KEYS = {"a": LEAVES, "b": LEAVES}
TREES = st.fixed_dictionaries(
    {},
    optional={
        **KEYS,
        "m": st.fixed_dictionaries(
            {}, optional={**KEYS, "m": st.fixed_dictionaries({}, optional=KEYS)}
        ),
    },
)


def leaves(tree, path=()):
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in leaves(value, (*path, key)).items()}


@given(TREES, TREES, TREES)
def test_merging_keeps_every_value_of_the_file_and_what_it_does_not_name(below, above, top):
    before = copy.deepcopy((below, above))
    merged = merge(below, above)
    assert leaves(merged) == {**leaves(below), **leaves(above)}
    assert (below, above) == before
    assert merge(merged, top) == merge(below, merge(above, top))
