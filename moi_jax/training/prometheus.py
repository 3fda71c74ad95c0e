"""The tracker `prometheus`: RUN/metrics.prom, for node_exporter's textfile collector."""

import math
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile


class PrometheusFile:
    """Writes the newest value of every metric to a file, which is replaced whole.

    A key "first/NAME/rest" is the metric moi_jax_first_rest with the label name="NAME": the name of
    a domain may have characters that the name of a metric may not have.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / "metrics.prom"
        self._run = run_dir.resolve().name
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}

    def track(self, record: dict[str, Any]) -> None:
        """Writes the file; None in the record is a number that is not finite."""
        for key, value in ({"skipped": False} | record).items():
            if value is None or isinstance(value, int | float):
                self._set(key, math.nan if value is None else float(value))
        write_to_textfile(str(self._path), self._registry)

    def _set(self, key: str, value: float) -> None:
        first, *name = key.split("/")
        metric = "_".join(["moi_jax", first, *name[1:]])
        if metric not in self._gauges:
            what = "/".join([first, *["NAME" for _ in name[:1]], *name[1:]])
            labels = ["run", *["name" for _ in name[:1]]]
            self._gauges[metric] = Gauge(
                metric, f"{what} in metrics.jsonl", labels, registry=self._registry
            )
        self._gauges[metric].labels(self._run, *name[:1]).set(value)
