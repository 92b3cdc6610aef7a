"""Publishes a stage's metrics on Triton's metrics page."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from triton_diffusion.observability.metrics import StageMetrics

PERIOD_S = 1.0


class MetricsPublisher:
    """Copies the numbers over once a second: a call into the server at every step would cost more than it tells."""

    def __init__(self, model: str, read: Callable[[], StageMetrics]) -> None:
        self._read = read
        self._published = StageMetrics()
        # A Metric is only good as long as its family lives.
        self._families: list[Any] = []
        self._metrics: dict[str, Any] = {}
        for field in dataclasses.fields(StageMetrics):
            ((kind, description),) = field.metadata.items()
            family = pb_utils.MetricFamily(
                name=f"diffusion_{field.name}",
                description=description,
                kind=getattr(pb_utils.MetricFamily, kind.upper()),
            )
            self._families.append(family)
            self._metrics[field.name] = family.Metric(labels={"model": model})
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish the last numbers and end."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            self._publish()
        self._publish()

    def _publish(self) -> None:
        current = self._read()
        # Gauges last: a request that is no longer shown as running has been counted.
        for field in sorted(dataclasses.fields(StageMetrics), key=lambda field: "gauge" in field.metadata):
            value, published = getattr(current, field.name), getattr(self._published, field.name)
            if value == published:
                continue
            if "gauge" in field.metadata:
                self._metrics[field.name].set(value)
            else:
                self._metrics[field.name].increment(value - published)
        self._published = current
