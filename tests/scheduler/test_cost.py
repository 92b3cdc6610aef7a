"""Estimates of how long a tick takes."""

from __future__ import annotations

import pytest

from triton_diffusion.scheduler import CostModel


def test_measured_sizes_are_told_as_measured_and_others_in_between() -> None:
    model = CostModel([(100, 1.0), (200, 1.5), (400, 2.5)])
    assert model.tick_s(200) == 1.5
    assert model.tick_s(300) == pytest.approx(2.0)


def test_outside_of_what_was_measured_time_is_in_proportion() -> None:
    model = CostModel([(100, 1.0), (200, 1.5)])
    assert model.tick_s(50) == pytest.approx(0.5)
    assert model.tick_s(400) == pytest.approx(3.0)


def test_work_is_counted_at_the_best_speed() -> None:
    assert CostModel([(100, 1.0), (200, 1.2)]).work_s(1000) == pytest.approx(6.0)


def test_nothing_is_estimated_before_anything_is_known() -> None:
    model = CostModel()
    assert (model.tick_s(100), model.work_s(100)) == (0.0, 0.0)
    model.observe(100, 2.0)
    assert model.tick_s(100) == 2.0


def test_a_size_that_is_slower_than_the_table_is_learnt_for_itself() -> None:
    model = CostModel([(100, 1.0)])
    for _ in range(100):
        model.observe(100, 3.0, "large")
    assert model.tick_s(100, "large") == pytest.approx(3.0, rel=0.01)
    assert model.tick_s(100, "other") == 1.0


def test_one_slow_tick_changes_little_and_a_fast_one_much() -> None:
    model = CostModel([(100, 1.0)])
    model.observe(100, 1.0)
    model.observe(100, 11.0)
    assert model.tick_s(100) == pytest.approx(2.0)
    model.observe(100, 1.0)
    assert model.tick_s(100) == pytest.approx(1.5)


def test_any_number_of_sizes_takes_bounded_memory() -> None:
    model = CostModel([(100, 1.0)])
    for number in range(10_000):
        model.observe(100, 2.0, f"key-{number}")
    assert len(model._factors) <= 256


def test_the_gain_of_a_batch_is_what_a_row_saves_in_the_best_one() -> None:
    assert CostModel().gain == 0
    assert CostModel([(10, 1.0)]).gain == 0
    assert CostModel([(10, 1.0), (20, 2.0)]).gain == 0
    assert CostModel([(10, 1.0), (40, 2.0), (80, 8.0)]).gain == pytest.approx(0.5)
