"""`triton-diffusion families`."""

from __future__ import annotations

import json

import pytest
from tests.client.conftest import FAMILIES, TritonDouble

from triton_diffusion_client import cli

TABLE = """\
wan (WanPipeline): text-to-video, image-to-video
  parameter      default  allowed       meaning
  num_frames     81       1 to 161      one more than a multiple of 4
  output_format  b64_mp4  b64_mp4, mp4  of the video
  seed                    at least 0
"""


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_families_prints_a_table(triton: TritonDouble, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    assert cli.main(["families", "--url", url, "--protocol", protocol]) == 0
    assert capsys.readouterr().out == TABLE
    assert triton.received[0].model == "families"


def test_families_prints_json_of_one_family_of_one_chain(
    triton: TritonDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["families", "wan", "--model", "wan", "--url", triton.grpc_url, "--json"]) == 0
    (family,) = json.loads(capsys.readouterr().out)
    assert family["pipeline_class"] == "WanPipeline"
    assert family["parameters"]["num_frames"] == {
        **FAMILIES[0]["parameters"]["num_frames"],  # type: ignore[index]
        "choices": [],
    }
    assert (triton.received[0].model, triton.received[0].value("name")) == ("wan_families", "wan")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "sd"], 1, "unknown model: 'sd_families' is not found; name the chain with --model\n"),
        (["--url", "127.0.0.1:1", "--retries", "0"], 1, "cannot reach a server at 127.0.0.1:1"),
        (["--timeout-s", "0"], 2, "timeout_s=0"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    triton: TritonDouble, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.main(["families", "--url", triton.grpc_url, *arguments]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
