"""What the tests share: eight simulated CPU devices, and where the golden files are."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden" / "qwen_v1"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN
