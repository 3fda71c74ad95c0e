"""An audit of a run: a chain of checks, one line each, and a signed file with what they found."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax

from moi_jax import config as config_lib
from moi_jax.common.atomic_files import check_writable
from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import cannot_write
from moi_jax.parallel.mesh import make_mesh
from moi_jax.training.audit.finding import FAILED, NOT_DONE, OK, Finding, Verdict, make_check
from moi_jax.training.audit.held_out import check_held_out
from moi_jax.training.audit.inputs import (
    check_cache,
    check_config,
    check_content,
    check_plan,
    check_sources,
    check_versions,
)
from moi_jax.training.audit.mix import check_mix
from moi_jax.training.audit.page import write_page
from moi_jax.training.audit.records import check_metrics, check_mixture
from moi_jax.training.audit.replay import check_replay
from moi_jax.training.audit.saved_run import (
    SavedRun,
    check_checkpoints,
    check_finite_values,
    find_run,
    open_run,
)
from moi_jax.training.audit.segments import check_segments
from moi_jax.training.audit.signed import sign, write_signed
from moi_jax.training.train import MakeEvaluations
from moi_jax.training.versions import versions

log = logging.getLogger(__name__)

Json = dict[str, Any]
FORMAT = 1  # of audit.json
# Checks that a sound run may lack what they need for. Without any other one nothing is proved.
OPTIONAL = ("versions", "sources", "held-out", "replay")


@dataclass(frozen=True)
class AuditOptions:
    """What is audited, and how much of it.

    Attributes:
      run: the directory of the run.
      overrides: settings, as `section.key=value`, that may differ in a resumed run, such as paths.
      out: where audit.json and audit.html go; None for RUN/audit.
      rows: rows that are run segment by segment.
      steps: the most steps that are replayed.
      seed: chooses the rows.
      base: of a run of adapters, see `moi_jax.load`.
    """

    run: Path
    overrides: tuple[str, ...] = ()
    out: Path | None = None
    rows: int = 32
    steps: int = 20
    seed: int = 0
    base: Path | None = None


@dataclass(frozen=True)
class AuditResult:
    """What an audit found, and where it is written.

    Attributes:
      findings: by the name of the check.
    """

    findings: dict[str, Finding]
    file: Path
    page: Path

    @property
    def verdict(self) -> Verdict:
        """FAILED if a check has failed; ok only if all but the optional ones were made."""
        if FAILED in (finding.verdict for finding in self.findings.values()):
            return FAILED
        needed = [self.findings[name].verdict for name in self.findings.keys() - OPTIONAL]
        return NOT_DONE if NOT_DONE in needed else OK

    @property
    def summary(self) -> str:
        """How many checks have which verdict."""
        counts = Counter(finding.verdict for finding in self.findings.values())
        return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def audit(
    options: AuditOptions,
    devices: Sequence[jax.Device],
    make_evaluations: MakeEvaluations | None = None,
) -> AuditResult:
    """Audits a run and writes audit.json and audit.html; the run itself is not changed.

    Args:
      devices: the devices for the mesh of the run.
      make_evaluations: see `moi_jax.evaluation.while_training`; None measures no held-out losses.

    Raises:
      UserError: there is no run with a checkpoint, the options do not fit it or these devices, or
        the results cannot be written. What is wrong with the run itself is a failed check.
    """
    directory = find_run(options.run)
    out = options.out or directory / "audit"
    check_writable(out)
    findings, run = _check_all(directory, options, devices, make_evaluations)
    result = AuditResult(findings, out / "audit.json", out / "audit.html")
    content = _content(options, result, run, devices)
    try:
        write_signed(result.file, signed := sign(content))
        write_page(result.page, signed)
    except OSError as error:
        raise cannot_write(out, error) from None
    return result


def _check_all(
    directory: Path,
    options: AuditOptions,
    devices: Sequence[jax.Device],
    make_evaluations: MakeEvaluations | None,
) -> tuple[dict[str, Finding], SavedRun | None]:
    """Makes all checks, each with the values of those that it needs, and logs a line for each."""
    findings: dict[str, Finding] = {}

    def check(name: str, function: Callable[..., Finding], *needed: Any) -> Any:
        finding = findings[name] = make_check(function, *needed)
        log.info(f"{finding.verdict:8}  {name:11}  {finding.text}")
        return finding.value

    steps = check("checkpoints", check_checkpoints, directory)
    run = open_run(directory, steps, devices, options.overrides, options.base) if steps else None
    with jax.set_mesh(run.mesh) if run else nullcontext():
        check("values", check_finite_values, run)
        check("config", check_config, run)
        check("versions", check_versions, run)
        check("sources", check_sources, run)
        data = check("cache", check_cache, run)
        check("content", check_content, run, data)
        rows = check("plan", check_plan, run, data)
        check("mixture", check_mixture, run, data)
        check("metrics", check_metrics, run, data, rows)
        check("mix", partial(check_mix, seed=options.seed, at_least=options.rows), data, rows)
        check("held-out", partial(check_held_out, make_evaluations=make_evaluations), run, data)
        segments = partial(check_segments, seed=options.seed, count=options.rows)
        check("segments", segments, run, data, rows)
        check("replay", partial(check_replay, most=options.steps), run, data)
    return findings, run


def _hash_files(run: SavedRun) -> dict[str, str]:
    """sha256 hex of the records that were checked, and of the checksums of each checkpoint."""
    contents = dict(run.records)
    contents |= {f"checkpoints/{saved.step}/{SUMS}": saved.sums for saved in run.steps}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _content(
    options: AuditOptions,
    result: AuditResult,
    run: SavedRun | None,
    devices: Sequence[jax.Device],
) -> Json:
    """The content of audit.json."""
    findings = result.findings
    files = _hash_files(run) if run else {}
    mesh = run.mesh if run else make_mesh(config_lib.Mesh(), devices)
    for domain in findings["sources"].figures.get("sources", {}).values():
        files |= {f"source {name}": digest for name, digest in domain["files"].items()}
    return {
        "format": FORMAT,
        "run": str(options.run),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": result.verdict,
        "checkpoint": run.newest.step if run else None,
        "settings": {
            "rows": options.rows,
            "steps": options.steps,
            "seed": options.seed,
            "overrides": list(options.overrides),
        },
        "versions": versions(mesh),
        "files": files,
        "checks": [
            {"name": name, "verdict": each.verdict, "text": each.text, "figures": each.figures}
            for name, each in findings.items()
        ],
    }
