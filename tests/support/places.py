"""Where things lie. A module of its own, since a process that needs only this imports no jax."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "moi_jax" / "data" / "samples"
