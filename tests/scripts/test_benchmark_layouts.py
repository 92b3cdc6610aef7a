"""The benchmarks of layouts, on models that are small and in rounds that are few."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks import scaling
from benchmarks.layouts.parity import LAYOUTS, measure_layouts


@pytest.mark.timeout(120)
def test_parity_of_layouts_finds_equal_latents_and_the_traffic_of_the_formula() -> None:
    figures = {figure.name: figure for figure in measure_layouts({"tp2": LAYOUTS["tp2"]})}
    assert all(math.isfinite(figure.value) for figure in figures.values())
    assert all(figure.holds is not False for figure in figures.values())
    assert figures["layout tp2: latents, largest difference"].holds
    assert figures["layout tp2: sent over tp, over the formula"].value == pytest.approx(1)
    assert figures["layout tp2: bfloat16 error over that of one rank"].value > 0


@pytest.mark.timeout(120)
def test_scaling_measures_the_layouts_it_is_given_on_a_model_of_any_size() -> None:
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    small = ["--heads", "2", "--head-dim", "32", "--layers", "1", "1", "--size", "64", "--rounds", "1", "--steps", "1"]
    small += ["--layouts", "u2", "--no-peers"]
    figures = {figure.name: figure for figure in scaling.measure(parser.parse_args(small)).figures}
    assert all(math.isfinite(figure.value) and figure.value > 0 for figure in figures.values())
    speedup = figures["layout u2: step of one rank over that of two"]
    assert speedup.goal == ">= 1.85"
    assert not any("tp2" in name for name in figures)
