"""The report of scripts/benchmark."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.report import Figure, Report, format_table, write_json


@pytest.mark.parametrize(("value", "holds"), [(1.049, True), (1.05, True), (1.051, False)])
def test_a_goal_holds_up_to_and_including_its_bound(value: float, holds: bool) -> None:
    assert Figure(name="ratio", value=value, at_most=1.05).holds is holds


@pytest.mark.parametrize(("value", "holds"), [(2.199, False), (2.2, True), (2.201, True)])
def test_a_goal_to_be_reached_holds_from_its_bound_on(value: float, holds: bool) -> None:
    figure = Figure(name="ratio", value=value, at_least=2.2)
    assert (figure.goal, figure.holds) == (">= 2.2", holds)


def test_the_json_has_the_machine_and_every_figure_with_its_goal_or_null(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "figures.json"
    figures = [
        Figure(name="ratio", value=1.2, at_most=1.05),
        Figure(name="share", value=99.5, unit="%", at_least=99),
        Figure(name="latency", value=3, unit="ms"),
    ]
    write_json(file, Report(machine="two cores", figures=figures))
    assert json.loads(file.read_text()) == {
        "machine": "two cores",
        "figures": [
            {"name": "ratio", "value": 1.2, "unit": "", "goal": "<= 1.05", "holds": False},
            {"name": "share", "value": 99.5, "unit": "%", "goal": ">= 99", "holds": True},
            {"name": "latency", "value": 3, "unit": "ms", "goal": None, "holds": None},
        ],
    }


def test_the_table_shows_a_missed_goal_and_keeps_its_columns() -> None:
    figures = [Figure(name="ratio", value=1.23456, at_most=1.05), Figure(name="latency", value=12.0, unit="ms")]
    assert format_table(figures).splitlines() == [
        "figure   value  unit  goal     holds",
        "-------  -----  ----  -------  -----",
        "ratio    1.235        <= 1.05  NO",
        "latency     12  ms",
    ]
