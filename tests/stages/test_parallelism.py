"""Stages and control messages on two real ranks, the same through all tests: a failure must not harm the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PARALLELISMS = ["replicated", "main_rank_only", "main_rank_only_and_send_to_others"]


class RankPair:
    """Two processes of rank_scenarios."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "rank_scenarios.py"), str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for rank in range(2)
        ]
        self._write(self.processes[1], self._read(self.processes[0]))

    def run(self, scenario: str, **arguments: Any) -> list[Any]:
        """What each rank answers to a scenario that both run at the same time."""
        for process in self.processes:
            self._write(process, json.dumps([scenario, arguments]))
        return [json.loads(self._read(process)) for process in self.processes]

    def close(self) -> None:
        """The ranks end by themselves at the end of their input."""
        for process in self.processes:
            process.stdin.close()  # type: ignore[union-attr]
        try:
            assert [process.wait(30) for process in self.processes] == [0, 0]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
                process.stdout.close()  # type: ignore[union-attr]

    @staticmethod
    def _write(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line.strip() + "\n")
        process.stdin.flush()

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline()


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPair]:
    pair = RankPair()
    yield pair
    pair.close()


# Where a stage runs.


def test_a_replicated_stage_runs_on_every_rank_with_its_own_result(ranks: RankPair) -> None:
    results = ranks.run("stage", parallelism="replicated", fails_on=None)
    assert [result["runs"] for result in results] == [1, 1]
    assert [result["outputs"][0]["rank"] for result in results] == [[0], [1]]


def test_a_main_rank_only_stage_runs_on_rank_0_and_stays_there(ranks: RankPair) -> None:
    results = ranks.run("stage", parallelism="main_rank_only", fails_on=None)
    assert [result["runs"] for result in results] == [1, 0]
    assert results[0]["outputs"][0]["rank"] == [0]
    assert results[1]["outputs"] == [{}, {}]


def test_a_stage_that_sends_to_others_runs_on_rank_0_and_its_sampled_tokens_agree(ranks: RankPair) -> None:
    results = ranks.run("stage", parallelism="main_rank_only_and_send_to_others", fails_on=None)
    assert [result["runs"] for result in results] == [1, 0]
    assert results[0]["outputs"] == results[1]["outputs"]
    assert results[0]["dtypes"] == results[1]["dtypes"]
    first, second = results[1]["outputs"]
    assert first["rank"] == [0]
    assert first["sampled.tokens"] != second["sampled.tokens"], "every request has its own"


# A stage whose predictions the ranks of the cfg axis share; a prediction is [its number, the rank that made it].


def test_a_guided_request_has_its_conditional_prediction_from_rank_0_and_the_other_from_rank_1(ranks: RankPair) -> None:
    results = ranks.run("cfg_stage", names=["a"], is_guided=True, fails_on=None)
    assert [result["runs"] for result in results] == [1, 1]
    assert [result["outputs"] for result in results] == [[{"conditional": [0, 0], "unconditional": [1, 1]}]] * 2


def test_every_request_of_a_guided_batch_gets_predictions_of_its_own(ranks: RankPair) -> None:
    results = ranks.run("cfg_stage", names=["a", "b"], is_guided=True, fails_on=None)
    expected = [
        {"conditional": [0, 0], "unconditional": [2, 1]},
        {"conditional": [1, 0], "unconditional": [3, 1]},
    ]
    assert [result["outputs"] for result in results] == [expected] * 2


def test_requests_without_guidance_keep_both_ranks_busy(ranks: RankPair) -> None:
    results = ranks.run("cfg_stage", names=["a", "b", "c"], is_guided=False, fails_on=None)
    expected = [{"conditional": [0, 0]}, {"conditional": [1, 0]}, {"conditional": [2, 1]}]
    assert [result["outputs"] for result in results] == [expected] * 2


def test_a_single_prediction_reaches_the_rank_that_has_none_to_make(ranks: RankPair) -> None:
    results = ranks.run("cfg_stage", names=["a"], is_guided=False, fails_on=None)
    assert [result["outputs"] for result in results] == [[{"conditional": [0, 0]}]] * 2


@pytest.mark.parametrize("fails_on", [0, 1])
def test_a_failed_prediction_on_either_rank_is_a_failure_on_both_and_the_next_run_is_fine(
    ranks: RankPair, fails_on: int
) -> None:
    failed = ranks.run("cfg_stage", names=["a", "b"], is_guided=True, fails_on=fails_on)
    expected = ["InvalidRequestError", f"rank {fails_on}: refused by {fails_on}"]
    assert [result["agreed"] for result in failed] == [{"a": expected, "b": expected}] * 2
    assert [result["raised"] for result in failed] == [fails_on == 0, fails_on == 1]
    assert [result["outputs"] for result in failed] == [[{}, {}]] * 2, "no rank has half of a result"
    following = ranks.run("cfg_stage", names=["a"], is_guided=True, fails_on=None)
    assert [result["agreed"] for result in following] == [{}, {}]
    assert [result["outputs"] for result in following] == [[{"conditional": [0, 0], "unconditional": [1, 1]}]] * 2


# Failures.


@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_a_failure_on_rank_0_is_one_on_both(ranks: RankPair, parallelism: str) -> None:
    results = ranks.run("stage", parallelism=parallelism, fails_on=0)
    expected = ["InvalidRequestError", "rank 0: refused by 0"]
    assert [result["agreed"] for result in results] == [{"a": expected, "b": expected}] * 2
    assert [result["raised"] for result in results] == [True, False]


def test_a_failure_on_rank_1_is_one_on_both(ranks: RankPair) -> None:
    results = ranks.run("stage", parallelism="replicated", fails_on=1)
    expected = ["InvalidRequestError", "rank 1: refused by 1"]
    assert [result["agreed"] for result in results] == [{"a": expected, "b": expected}] * 2
    assert [result["raised"] for result in results] == [False, True]


def test_a_rank_that_does_not_run_the_stage_cannot_fail_in_it(ranks: RankPair) -> None:
    for parallelism in PARALLELISMS[1:]:
        assert [result["agreed"] for result in ranks.run("stage", parallelism=parallelism, fails_on=1)] == [{}, {}]


def test_the_group_goes_on_after_a_failure(ranks: RankPair) -> None:
    for fails_on in (0, 1, None):
        results = ranks.run("stage", parallelism="replicated", fails_on=fails_on)
        assert bool(results[0]["agreed"]) == (fails_on is not None)
    assert [result["length"] for result in ranks.run("broadcast", size_bytes=5000)] == [5000, 5000]


def test_different_failures_on_both_ranks_are_merged_alike(ranks: RankPair) -> None:
    both = ranks.run("agree", own=[{"a": "first", "b": "x" * 10_000}, {"c": "größer", "a": "second"}])
    assert both[0] == both[1]
    assert both[0] == {
        "a": ["StageError", "rank 0: RuntimeError: first"],
        "b": ["StageError", "rank 0: RuntimeError: " + "x" * 10_000],
        "c": ["StageError", "rank 1: RuntimeError: größer"],
    }


def test_an_id_with_odd_characters_survives_agreement(ranks: RankPair) -> None:
    """A NUL byte is also what messages of different length are padded with."""
    both = ranks.run("agree", own=[{}, {"\0 \n蓝\0": "\0"}])
    assert both[0] == both[1] == {"\0 \n蓝\0": ["StageError", "rank 1: RuntimeError: \0"]}


def test_running_out_of_memory_counts_for_more_than_what_it_causes_on_other_ranks(ranks: RankPair) -> None:
    for own in ([{"a": "x"}, {"a": "out of memory"}], [{"a": "out of memory"}, {"a": "x"}]):
        both = ranks.run("agree", own=own)
        assert both[0] == both[1]
        assert both[0]["a"][0] == "ResourceExhaustedError"


def test_no_failure_is_agreed_on_as_none(ranks: RankPair) -> None:
    assert ranks.run("agree", own=[{}, {}]) == [{}, {}]


# Control messages.


@pytest.mark.parametrize("size_bytes", [0, 1, 4087, 4088, 4089, 100_000])
def test_bytes_of_every_length_reach_all_ranks(ranks: RankPair, size_bytes: int) -> None:
    results = ranks.run("broadcast", size_bytes=size_bytes)
    assert [result["length"] for result in results] == [size_bytes, size_bytes]
    assert results[0]["hash"] == results[1]["hash"]
    assert results[0]["intact"]
