"""`triton-diffusion load` and `unload`: all models of a name, in the right order."""

from __future__ import annotations

import pytest
from tests.client.conftest import TritonDouble

from triton_diffusion_client import cli

WAN = [
    *["wan_image_encoding", "wan_text_encoding", "wan_denoising", "wan_decoding"],
    *["wan_cancellation", "wan_families", "wan_stream", "wan"],
]


@pytest.fixture(params=["grpc", "http"])
def server(request: pytest.FixtureRequest, triton: TritonDouble) -> list[str]:
    url = triton.grpc_url if request.param == "grpc" else triton.http_url
    return ["--protocol", request.param, "--url", url]


def test_load_takes_the_stages_first_at_the_same_time_and_the_chain_last(
    triton: TritonDouble, server: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["load", "wan", *server]) == 0
    controlled = [(verb, model) for verb, model, _ in triton.repository.controlled]
    assert sorted(controlled[:-2]) == sorted(("load", model) for model in WAN[:-2])
    assert controlled[-2:] == [("load", "wan_stream"), ("load", "wan")]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" after ")[0] for line in lines] == [f"loaded {model}" for model in WAN]


def test_the_models_of_the_default_name_have_no_prefix(triton: TritonDouble, server: list[str]) -> None:
    assert cli.main(["load", "diffusion", *server]) == 0
    names = ["text_encoding", "denoising", "decoding", "cancellation", "families", "diffusion_stream", "diffusion"]
    controlled = [model for _, model, _ in triton.repository.controlled]
    assert sorted(controlled[:-2]) == sorted(names[:-2])
    assert controlled[-2:] == names[-2:]


def test_unload_waits_for_each_model_to_be_gone_and_takes_the_chain_first(
    triton: TritonDouble, server: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A chain answers its last requests with the help of its stages: they must stay until it is gone."""
    triton.repository.states |= dict.fromkeys([*WAN, "diffusion", "denoising"], "READY")
    assert cli.main(["unload", "wan", *server]) == 0
    assert [model for _, model, _ in triton.repository.controlled] == WAN[::-1]
    for position, (_, _, there) in enumerate(triton.repository.controlled):
        assert [model for model in WAN if model in there] == WAN[: len(WAN) - position]
    assert triton.repository.loaded() == ["denoising", "diffusion"], "those of another name stay"
    assert capsys.readouterr().out == "".join(f"unloaded {model}\n" for model in WAN[::-1])


def test_unload_says_when_nothing_is_loaded(
    triton: TritonDouble, server: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["unload", "wan", *server]) == 0
    assert capsys.readouterr().err == "no model of the name wan was loaded\n"
    assert triton.repository.controlled == []


def test_a_model_that_does_not_load_is_named_with_its_reason_and_what_is_loaded(
    triton: TritonDouble, server: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    triton.repository.failing["wan_denoising"] = "28 GB are wanted, 8 GB are free"
    assert cli.main(["load", "wan", *server]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: wan_denoising could not be loaded: ")
    assert "28 GB are wanted, 8 GB are free; loaded before it: wan_image_encoding, wan_text_encoding\n" in message
    assert cli.main(["unload", "wan", *server]) == 0
    assert triton.repository.loaded() == []


@pytest.mark.parametrize("command", ["load", "unload"])
def test_a_server_whose_models_are_fixed_says_how_to_start_it(
    triton: TritonDouble, server: list[str], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    triton.repository.is_explicit = False
    triton.repository.states |= dict.fromkeys(WAN, "READY")
    assert cli.main([command, "wan", *server]) == 1
    message = capsys.readouterr().err
    assert "--model-control-mode=explicit" in message
    assert "polling" not in message, "Triton's own words, which are wrong for a server that does not poll"


@pytest.mark.parametrize("name", ["flux", "wan_denoising", "wander", "other", ""])
def test_a_name_without_models_is_refused_with_those_there_are(
    triton: TritonDouble, server: list[str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for command in ("load", "unload"):
        assert cli.main([command, name, *server]) == 1
        assert f"of the name {name!r}; names there: diffusion, wan\n" in capsys.readouterr().err
    assert triton.repository.controlled == []


def test_unload_gives_up_after_the_time_out(
    triton: TritonDouble, server: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    triton.repository.states |= dict.fromkeys(WAN, "READY")
    triton.repository.unloading_s = 60
    assert cli.main(["unload", "wan", "--timeout-s", "0.3", *server]) == 1
    message = capsys.readouterr().err
    assert "wan was not unloaded within timeout_s=0.3, and the server goes on with it; allow more" in message
    assert [model for _, model, _ in triton.repository.controlled] == ["wan"], "its stages are still needed"


def test_a_server_that_is_closed_by_a_key_opens_for_it(
    triton: TritonDouble,
    server: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_DIFFUSION_ADMIN_KEY", raising=False)
    triton.admin_key = "sesame"
    for wrong in ([], ["--admin-key", "rice"]):
        assert cli.main(["load", "wan", *server, *wrong]) == 1
        message = capsys.readouterr().err
        assert "is restricted" in message
        assert "--admin-key or in TRITON_DIFFUSION_ADMIN_KEY" in message
        assert message.count("\n") == 1
    assert triton.repository.controlled == []
    assert cli.main(["load", "wan", *server, "--admin-key", "sesame"]) == 0
    monkeypatch.setenv("TRITON_DIFFUSION_ADMIN_KEY", "sesame")
    assert cli.main(["unload", "wan", *server]) == 0


def test_an_unreachable_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for protocol in ("grpc", "http"):
        assert cli.main(["load", "wan", "--url", "127.0.0.1:1", "--protocol", protocol]) == 1
        assert capsys.readouterr().err.startswith("error: cannot reach a server at 127.0.0.1:1")
