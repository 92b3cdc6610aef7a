"""Figures: what a benchmark hands back, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    """NaN: not measured, for the reason that the name tells."""
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    """The goal, at most one of the two; None where there is none."""

    @property
    def goal(self) -> str | None:
        """The goal in words."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return None if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def holds(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        value = None if math.isnan(self.value) else self.value
        return {"name": self.name, "value": value, "unit": self.unit, "goal": self.goal, "holds": self.holds}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a benchmark found, and on what machine."""

    machine: str
    figures: Sequence[Figure]
    must_hold: bool = False
    """Whether a goal that is missed makes the command fail."""

    @property
    def has_failed(self) -> bool:
        """Whether a goal is missed that must hold."""
        return self.must_hold and any(figure.holds is False for figure in self.figures)


def describe_machine(*, dtype: str, num_threads: int) -> str:
    """The machine and the software that the figures hold for, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    cores = len(os.sched_getaffinity(0))
    return f"{_cpu_model()}, {cores} cores, {num_threads} threads a process, {dtype}; {packages}"


def print_report(report: Report) -> None:
    """The table, and under it the machine."""
    print(format_table(report.figures))
    print(f"\n{report.machine}")


def format_table(figures: Iterable[Figure]) -> str:
    """A line a figure."""
    rows = [("figure", "value", "unit", "goal", "holds")]
    holds = {True: "yes", False: "NO", None: ""}
    rows += [(each.name, _digits(each.value), each.unit, each.goal or "", holds[each.holds]) for each in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for name, value, *rest in rows:
        cells = [name.ljust(widths[0]), value.rjust(widths[1])]
        cells += [cell.ljust(width) for cell, width in zip(rest, widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def write_json(path: Path, report: Report) -> None:
    """Write `{"machine": "...", "figures": [...]}`."""
    content = {"machine": report.machine, "figures": [figure.to_json() for figure in report.figures]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _digits(value: float) -> str:
    """Four significant digits, whole numbers as they are, a dash for none."""
    if math.isnan(value):
        return "-"
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
