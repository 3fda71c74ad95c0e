"""What the tests share: eight simulated CPU devices, compiled programs, the golden files."""

import os
import tempfile

from support.xla import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla_flags(devices=8)

# The same program is compiled once, whichever worker or command of a test needs it first. Workers
# find the directory of the process that started them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import gc
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden" / "qwen_v1"
# The files that take longest. They begin first, so that the workers end at about the same time.
LONGEST = {
    "accounting/test_compiled_step.py",
    "accounting/test_plan.py",
    "data/test_prepare.py",
    "docs/test_docs.py",
    "docs/test_tutorial.py",
    "models/test_families.py",
    "parallel/test_hosts.py",
    "parallel/test_hosts_evaluate.py",
    "parallel/test_mesh.py",
    "sampling/test_generate.py",
    "sampling/test_sampler.py",
    "test_faults.py",
    "training/test_audit.py",
    "training/test_resume.py",
    "training/test_run.py",
    "training/test_train.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.relative_to(TESTS).as_posix() not in LONGEST)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not visit it again and again."""
    gc.freeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command that a test runs in this process shows its log; the next test must not."""
    logger = logging.getLogger("moi_jax")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def log_text() -> Iterator[io.StringIO]:
    """What moi_jax logs, as plain text."""
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger("moi_jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield text
    logger.removeHandler(handler)
    logger.setLevel(level)
