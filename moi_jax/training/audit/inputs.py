"""Checks of what a run was made from: config, sources, cache, tokenizer, plan and versions."""

from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.config import Config
from moi_jax.config.files import NOT_YAML, parse_yaml
from moi_jax.config.load import make_config
from moi_jax.data.cache.inspection import open_unchanged, verify_records
from moi_jax.data.cache.prepare import domain_sources
from moi_jax.data.dataset import select_dataset
from moi_jax.data.planning.epoch import PLANNER
from moi_jax.data.planning.training_plan import TrainingPlan
from moi_jax.text.tokenizer import load_tokenizer
from moi_jax.training.audit.finding import Finding, NotDone, passed
from moi_jax.training.audit.row_figures import row_figures
from moi_jax.training.audit.saved_run import PlannedRun, SavedRun
from moi_jax.training.resume import MAY_CHANGE, config_changes, fingerprints
from moi_jax.training.versions import differences, versions

Sources = dict[str, dict[str, Any]]


def check_config(run: SavedRun) -> Finding:
    """config.yaml and the configs of all checkpoints are those of one run."""
    newest = run.newest.config.model_dump(mode="json")
    others = {"config.yaml": _recorded_config(run)}
    others |= {f"checkpoint {saved.step}": saved.config for saved in run.steps[1:]}
    changed = []
    for name, config in others.items():
        before = config.model_dump(mode="json")
        for change, may in config_changes(before, newest, (*MAY_CHANGE, "model.init_from")):
            # A resumed run writes config.yaml before it goes on, so a checkpoint knows it.
            if may == "never" or (may == "if allowed" and name == "config.yaml"):
                raise UserError(
                    f"{name} differs from the config in checkpoint {run.newest.step} ({change}), "
                    f"which decides how the run was trained; restore it from the checkpoint"
                )
            changed.append(f"{name}: {change}")
    text = f"config.yaml is the config in checkpoint {run.newest.step}"
    if changed:
        text += f"; settings that may change have changed: {changed[0]}"
        text += f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return passed(text, changed=changed)


def _recorded_config(run: SavedRun) -> Config:
    """The config of config.yaml; raises UserError where it is none."""
    place = f"config.yaml of {run.directory}"
    try:
        values = parse_yaml(run.records.get("config.yaml", b"").decode("utf-8"))
    except NOT_YAML as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{place} is not valid YAML ({reason}); restore it from the checkpoint"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{place} holds no sections; restore it from the checkpoint")
    return make_config(values, where=place)


def check_sources(run: SavedRun) -> Finding:
    """Every byte of the sources is as it was when they were prepared."""
    recorded: Sources | None = run.newest.position.get("sources")
    if recorded is None:
        raise NotDone(
            "the checkpoint is of a version that recorded no checksums of sources; the check of "
            "the cache finds sources that have changed, without their names"
        )
    now = domain_sources(run.config.data, run.experiment.tokenizer)
    for name, domain in recorded.items():
        _compare_files(name, domain["files"], now[name]["files"])
        if domain["key"] != now[name]["key"]:
            raise UserError(
                f"the files of domain {name} are as recorded, but this version would prepare "
                f"them in another way (key {domain['key'][:16]}, now {now[name]['key'][:16]}); "
                f"audit with the version of moi_jax that trained the run"
            )
    files = sum(len(domain["files"]) for domain in recorded.values())
    return passed(f"{files:,} files of {len(now)} domains have the recorded SHA-256", sources=now)


def _compare_files(domain: str, before: dict[str, str], now: dict[str, str]) -> None:
    """Raises UserError with the first file that differs; a new name alone is no difference."""
    if list(before.values()) == list(now.values()):
        return
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) == now.get(name):
            continue
        what = "has changed" if name in now and name in before else "is missing"
        what = what if name in before else "is new"
        raise UserError(
            f"{name}, a source of domain {domain}, {what} since the run was trained (SHA-256 "
            f"{before.get(name, 'none')[:16]}, now {now.get(name, 'none')[:16]}); restore the file"
        )
    raise UserError(f"the sources of domain {domain} stand in another order; restore their names")


def check_cache(run: SavedRun) -> Finding:
    """The cache that the run read is whole; the value is its dataset, opened from there."""
    data, tokenizer = run.config.data, run.experiment.tokenizer
    sources = run.newest.position.get("sources") or domain_sources(data, tokenizer)
    folder = expand_home(data.cache_dir)
    caches = [
        open_unchanged(name, domain["key"], folder, domain["files"])
        for name, domain in sources.items()
    ]
    records = sum(verify_records(cache) for cache in caches)
    blocks = sum(len(cache.blocks) for cache in caches)
    dataset = select_dataset(run.config, tokenizer, caches)
    position = run.newest.position
    plan = TrainingPlan(
        dataset.corpus, run.config.data, run.config.train, (0,), position["step"], position["row"]
    )
    return passed(
        f"{records:,} conversations of {len(caches)} domains in {blocks:,} blocks are as they "
        f"were written",
        PlannedRun(dataset, plan),
        records=records,
        blocks=blocks,
        keys={cache.name: cache.key for cache in caches},
    )


def check_content(run: SavedRun, data: PlannedRun) -> Finding:
    """Model, tokenizer, template, prompts and data have the fingerprints in the checkpoint."""
    saved = run.newest.position["fingerprints"]
    now = fingerprints(run.experiment, data.dataset)
    for what, fingerprint in now.items():
        if saved.get(what) != fingerprint:
            raise UserError(
                f"the content of {what} is not the one in checkpoint {run.newest.step} "
                f"(fingerprint {saved.get(what)}, now {fingerprint}); restore it"
            )
    tokenizer = run.experiment.tokenizer
    path = run.config.tokenizer.path
    if path and expand_home(path).is_dir():  # else the checkpoint's own copy is all there is
        on_disk = load_tokenizer(expand_home(path), tokenizer.template.name)
        if on_disk.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"the tokenizer in {path} is not the one in checkpoint {run.newest.step}; restore "
                f"its files, or take them from the checkpoint"
            )
    return passed(f"{', '.join(now)} have the recorded fingerprints", fingerprints=now)


def check_plan(run: SavedRun, data: PlannedRun) -> Finding:
    """The plan that is made now is the one that the run followed; the value is its figures."""
    position, plan = run.newest.position, data.plan
    if (planner := position.get("planner", 1)) != PLANNER:
        raise UserError(
            f"planner {planner} planned the rows of the run, and this version has planner "
            f"{PLANNER}; audit with the version of moi_jax that trained the run"
        )
    last = max(position["row"] - 1, 0)
    epoch_rows = plan.epoch_first_rows(last)
    epoch_plan = plan.epoch_plan(plan.locate(last)[0])
    for what, saved, now in (
        ("the first rows of its epochs", position["epoch_rows"], epoch_rows),
        ("the plan of its last epoch", position["plan"], epoch_plan.fingerprint),
    ):
        if saved != now:
            raise UserError(
                f"{what}: checkpoint {run.newest.step} has {saved}, planned again it is {now}; "
                f"audit with the versions of moi_jax and numpy that trained the run"
            )
    return passed(
        f"the {position['row']:,} rows so far are planned again as recorded, the last of them in "
        f"epoch {len(epoch_rows) - 1}",
        row_figures(data, position["row"]),
        rows=position["row"],
        epoch_rows=epoch_rows,
        plan=epoch_plan.fingerprint,
    )


def check_versions(run: SavedRun) -> Finding:
    """The code is of the recorded version; other differences are told."""
    now, recorded = versions(run.mesh), run.newest.position.get("versions")
    if recorded is None:
        raise NotDone("the checkpoint is of a version that recorded no versions")
    if recorded["moi_jax"] != now["moi_jax"]:
        raise UserError(
            f"checkpoint {run.newest.step} was saved by moi_jax {recorded['moi_jax']}, and this is "
            f"{now['moi_jax']}; audit with the version that trained the run"
        )
    found = differences(recorded, now)
    text = f"moi_jax {now['moi_jax']} (code {now['code']}), jax {now['jax']}, {now['device']}"
    text += f"; not as recorded: {', '.join(found)}" if found else ", all as recorded"
    return passed(text, recorded=recorded, now=now, differences=found)
