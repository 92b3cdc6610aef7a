"""What a server and its models tell each other by files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from triton_diffusion.run_folder import BEAT_S, VARIABLE, ChainFolder, RunFolder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def test_signs_of_life_are_seen_until_the_model_ends_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("triton_diffusion.run_folder.time.monotonic", lambda: now_s)
    server, chain = RunFolder(folder), ChainFolder()
    assert server.beats() == {}
    chain.beat()
    os.utime(folder / f"alive-{os.getpid()}", (0, 0))
    chain.beat()
    assert server.beats() == {os.getpid(): 0}, "more often than needed"
    now_s += BEAT_S
    chain.beat()
    assert server.beats()[os.getpid()] > 0
    chain.end_beats()
    assert server.beats() == {}


def test_a_chain_asks_to_be_replaced_and_is_told_when_it_was(folder: Path) -> None:
    server, chain = RunFolder(folder), ChainFolder()
    assert server.chains() == {os.getpid()}
    assert server.worn_chains() == set()
    chain.tell_worn()
    assert server.worn_chains() == {os.getpid()}
    server.retire(1)
    assert not chain.is_retired()
    server.retire(os.getpid())
    assert chain.is_retired()


def test_a_chain_is_told_to_drain(folder: Path) -> None:
    server, chain = RunFolder(folder), ChainFolder()
    assert not chain.is_draining()
    server.order_drain()
    assert chain.is_draining()
    assert not server.is_drained(os.getpid())
    chain.tell_drained()
    assert server.is_drained(os.getpid())


@pytest.mark.parametrize("path", ["", "gone"])
def test_without_a_folder_nothing_is_told(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, path and str(tmp_path / path))
    chain = ChainFolder()
    chain.beat()
    chain.tell_worn()
    chain.tell_drained()
    chain.end_beats()
    assert not chain.is_draining()
    assert not chain.is_retired()
