"""The key that the models of one tritonserver share, and its callers do not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from triton_diffusion import stage_key
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.stage_key import PARAMETER, VARIABLE, check_key, key_of_server, own_key

_OWN_KEY = "from triton_diffusion.stage_key import own_key; print(own_key())"


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    own_key.cache_clear()


def _keys_of_two_children() -> set[str]:
    return {subprocess.check_output([sys.executable, "-c", _OWN_KEY], text=True).strip() for _ in range(2)}


def test_all_children_of_a_process_have_its_key_and_other_processes_have_another() -> None:
    assert _keys_of_two_children() == {key_of_server(os.getpid())}
    another = "import os; from triton_diffusion.stage_key import key_of_server; print(key_of_server(os.getpid()))"
    assert subprocess.check_output([sys.executable, "-c", another], text=True).strip() != key_of_server(os.getpid())


def test_the_operator_can_choose_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "chosen")
    assert _keys_of_two_children() == {"chosen"}


def test_a_call_needs_the_key() -> None:
    check_key(json.dumps({PARAMETER: own_key()}))
    for parameters in (
        "",
        "{}",
        *(json.dumps({PARAMETER: value}) for value in ("", "x", 7, None, [own_key()], "\ud800")),
    ):
        with pytest.raises(InvalidRequestError, match="send requests to the model diffusion"):
            check_key(parameters)


def test_a_server_whose_memory_cannot_be_seen_needs_a_key_of_the_operator() -> None:
    with pytest.raises(ConfigurationError, match=stage_key.VARIABLE):
        key_of_server(2**22 + 1)
