"""The numbers on the server's page for Prometheus."""

from __future__ import annotations

import re
import urllib.request

# Once a second the models publish what they have counted.
PUBLISHED_AFTER_S = 1.5

_LINE = re.compile(r'^diffusion_(\w+)\{[^}]*model="([^"]+)"[^}]*\} (\S+)$', re.MULTILINE)

Metrics = dict[tuple[str, str], float]
"""Values by name, without its prefix, and model."""


def parse_metrics(page: str) -> Metrics:
    """The project's own numbers on the page."""
    return {(name, model): float(value) for name, model, value in _LINE.findall(page)}


def fetch_metrics(url: str) -> Metrics:
    """What the page says now."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return parse_metrics(response.read().decode())
