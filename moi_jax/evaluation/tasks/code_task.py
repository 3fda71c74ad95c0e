"""The common part of HumanEval and MBPP: answers run as programs in the sandbox, and pass@k."""

import logging
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import ceil, comb

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Json, Response, Score, Task
from moi_jax.evaluation.sandbox.backends import Limits
from moi_jax.evaluation.sandbox.execution import Program, Verdict
from moi_jax.evaluation.sandbox.packages import find_packages
from moi_jax.evaluation.sandbox.sandbox import WEAK, Sandbox

log = logging.getLogger(__name__)


PASS_AT = (1, 10, 100)


class CodeTask(Task):
    """A benchmark of programs. The failure of an item is the failure of its verdict.

    With several answers, an item has an estimate of pass@k for each k of PASS_AT that is not above
    their number. It fails if no answer passes, with the most common failure.
    """

    def __init__(self, options: BenchmarkOptions):
        super().__init__(options)
        if not options.allow_code_execution:
            raise UserError(
                f"{self.name} runs the programs that the model writes, in a sandbox on this "
                f"machine; allow it with --allow-code-execution"
            )
        if further := [f"pass@{k}" for k in PASS_AT[1:] if k <= options.samples]:
            self.scoring += f". The results have unbiased estimates of {' and '.join(further)} too"
        wall = options.code_timeout
        self.sandbox = Sandbox(
            options.sandbox,
            # A second of processor time more, so that the wall time decides.
            Limits(wall=wall, cpu=ceil(wall) + 1),
            packages=find_packages(options.code_packages),
        )
        if options.sandbox == "weak":
            log.warning(f"{self.name}: {WEAK}")

    @abstractmethod
    def program(self, item: Item, answer: str) -> Program:
        """The program of an answer, with its tests. Blank code fails as "no code"."""

    def score(self, responses: Iterable[tuple[Item, Response]]) -> Iterator[Score]:
        started: deque[list[Program]] = deque()

        def programs() -> Iterator[Program]:
            for item, response in responses:
                # A missing answer fails like an empty one.
                started.append([self.program(item, text) for text in response.texts or ("",)])
                yield from started[-1]

        verdicts = self.sandbox.run_all(programs())
        for first in verdicts:
            of_item = started.popleft()
            yield _score(of_item, [first, *islice(verdicts, len(of_item) - 1)])

    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        return {"pass@1": 1.0}

    def settings(self) -> Json:
        """The limits are those of one program with its tests; memory is that of each process."""
        limits = self.sandbox.limits
        return {
            "sandbox": self.sandbox.backend,
            "code_timeout_s": limits.wall,
            "code_memory_mib": limits.memory >> 20,
            "code_packages": list(self.sandbox.packages.versions),
        }

    def notes(self, items: Sequence[Item], scores: Sequence[Score]) -> list[str]:
        return [WEAK] if self.options.sandbox == "weak" else []


def pass_at(k: int, samples: int, passed: int) -> float:
    """The unbiased estimate of pass@k (Chen et al. 2021, section 2.1)."""
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def _score(programs: Sequence[Program], verdicts: Sequence[Verdict]) -> Score:
    passed = sum(verdict.passed for verdict in verdicts)
    count = len(verdicts)
    metrics = {f"pass@{k}": pass_at(k, count, passed) for k in PASS_AT if k <= count}
    kinds = Counter(verdict.failure for verdict in verdicts)
    samples = [
        {"code": program.code, "failure": verdict.failure, "error": verdict.error}
        for program, verdict in zip(programs, verdicts, strict=True)
    ]
    details = samples[0] if count == 1 else {"samples": samples}
    return Score(metrics, None if passed else kinds.most_common(1)[0][0], details)
