"""The command line `triton-diffusion`: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.client.conftest import VIDEO_FILES, TritonDouble

from triton_diffusion_client import cli
from triton_diffusion_client._output_files import OutputFiles, plan_output, slugify

COMMANDS = ["generate", "cancel", "families", "health", "load", "unload", "serve", "build-repository"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def open_picture(path: str) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def run(triton: TritonDouble, *arguments: str) -> int:
    return cli.main(["generate", "--url", triton.grpc_url, "--retries", "0", *arguments])


def test_generate_saves_a_picture_and_tells_path_seed_and_times(
    triton: TritonDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(triton, "--prompt", "A red circle!", "--seed", "5") == 0
    assert open_picture("outputs/a-red-circle-5.png").size == (16, 8)
    printed = capsys.readouterr().out
    assert printed.startswith("outputs/a-red-circle-5.png  seed 5  1.50 s (queue 0.25 s, text_encoding 0.25 s")
    assert printed.count("\n") == 1


def test_all_flags_reach_the_model(triton: TritonDouble) -> None:
    flags = {
        "negative_prompt": "blur",
        "height": 64,
        "width": 128,
        "num_frames": 17,
        "fps": 12.5,
        "flow_shift": 8.0,
        "strength": 0.75,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "guidance_scale_2": 1.5,
        "embedded_guidance_scale": 2.5,
        "seed": -3,
        "max_sequence_length": 48,
        "output_quality": 90,
        "preview_interval": 3,
        "priority": 9,
        "deadline_s": 2.5,
        "deadline_action": "continue",
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert run(triton, "--prompt", "x", "--num-images-per-prompt", "2", *arguments) == 0
    request = triton.received[0]
    assert {name: request.value(name) for name in flags} == flags
    assert request.value("num_outputs") == 2


def test_a_request_has_the_id_and_the_scope_that_are_given(
    triton: TritonDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(triton, "--prompt", "x", "--request-id", "r1", "--cancel-scope", "team", "--json") == 0
    assert (triton.received[0].id, triton.received[0].parameters) == ("r1", {"cancel_scope": "team"})
    assert json.loads(capsys.readouterr().out)["request_id"] == "r1"
    assert run(triton, "--prompt", "x", "--no-stream") == 0
    assert triton.received[1].id not in ("", "r1")
    assert triton.received[1].parameters == {}, "without a scope it is that of all who name none"


def test_prompts_are_asked_for_together(triton: TritonDouble, capsys: pytest.CaptureFixture[str]) -> None:
    started_s = time.monotonic()
    prompts = [part for number in range(6) for part in ("--prompt", "slow")]
    assert run(triton, *prompts, "--num-inference-steps", "10", "--quiet") == 0
    assert time.monotonic() - started_s < 2
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(["outputs/slow-7.png"] + [f"outputs/slow-7-{n}.png" for n in range(2, 7)])
    assert all(Path(path).exists() for path in printed)


def test_concurrency_limits_the_requests_at_a_time(triton: TritonDouble) -> None:
    started_s = time.monotonic()
    prompts = [part for number in range(4) for part in ("--prompt", "slow")]
    assert run(triton, *prompts, "--num-inference-steps", "5", "--concurrency", "1", "--quiet") == 0
    assert time.monotonic() - started_s >= 4 * 5 * 0.05


def test_json_gives_a_line_for_each_picture(triton: TritonDouble, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(triton, "--prompt", "ein Käfer", "--num-images-per-prompt", "2", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seed"] for line in lines] == [7, 8]
    assert [line["path"] for line in lines] == ["outputs/ein-käfer-7.png", "outputs/ein-käfer-8.png"]
    assert lines[0]["prompt"] == "ein Käfer"
    assert lines[0]["timings"]["stages_s"] == {"text_encoding": 0.25, "denoising": 1.0}
    assert lines[0]["warnings"] == []
    assert lines[0]["request_id"] == triton.received[0].id


def test_warnings_of_the_server_are_shown(triton: TritonDouble, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(triton, "--prompt", "x", "--guidance-scale", "3") == 0
    assert capsys.readouterr().err == "warning: guidance_scale has no effect\n"


def test_previews_are_saved_beside_the_picture(triton: TritonDouble) -> None:
    assert run(triton, "--prompt", "x", "--num-inference-steps", "4", "--preview-interval", "2") == 0
    assert sorted(os.listdir("outputs")) == ["x-7.png", "x-step-002.png", "x-step-004.png"]
    assert run(triton, "--prompt", "x", "--preview-interval", "2", "--output", "one.jpg") == 0
    assert sorted(path.name for path in Path().glob("one*")) == ["one-step-002.jpg", "one.jpg"]


def test_no_stream_asks_the_model_that_answers_once(triton: TritonDouble) -> None:
    assert run(triton, "--prompt", "x", "--no-stream", "--output-format", "webp") == 0
    assert triton.received[0].model == "diffusion"
    assert open_picture("outputs/x-7.webp").format == "WEBP"


def test_generate_over_http(triton: TritonDouble) -> None:
    arguments = ["generate", "--protocol", "http", "--url", triton.http_url, "--prompt", "x"]
    assert cli.main(arguments) == 0
    assert open_picture("outputs/x-7.png").size == (16, 8)
    assert cli.main([*arguments, "--output-format", "jpeg"]) == 0
    assert open_picture("outputs/x-7.jpg").format == "JPEG"


@pytest.mark.parametrize(
    ("arguments", "asked_for", "path"),
    [
        ([], None, "outputs/x-7.mp4"),
        (["--output-format", "webm"], "webm", "outputs/x-7.webm"),
        (["--output", "new/clip.GIF"], "gif", "new/clip.GIF"),
        (["--output", "clip.mp4", "--no-stream"], "mp4", "clip.mp4"),
    ],
)
def test_a_video_has_the_suffix_of_its_format(
    triton: TritonDouble, arguments: list[str], asked_for: str | None, path: str
) -> None:
    assert run(triton, "--model", "wan", "--prompt", "x", *arguments) == 0
    assert triton.received[0].value("output_format") == asked_for
    assert triton.received[0].model == ("wan" if "--no-stream" in arguments else "wan_stream")
    assert Path(path).read_bytes() == VIDEO_FILES[asked_for or "mp4"]


def test_the_previews_of_a_video_are_pictures(triton: TritonDouble) -> None:
    arguments = ["--model", "wan", "--prompt", "x", "--preview-interval", "3", "--output-format", "mp4"]
    assert run(triton, *arguments) == 0
    assert sorted(os.listdir("outputs")) == ["x-7.mp4", "x-step-003.png"]


def test_pictures_are_read_once_and_sent_with_each_prompt(triton: TritonDouble) -> None:
    Path("a.png").write_bytes(b"first")
    Path("b.jpg").write_bytes(b"second")
    assert run(triton, "--prompt", "x", "--prompt", "y", "--image", "a.png", "--image", "b.jpg") == 0
    for request in triton.received:
        assert request.inputs["image"] == ("BYTES", [2], [b"first", b"second"])


def test_headers_are_sent(triton: TritonDouble) -> None:
    assert run(triton, "--prompt", "x", "--header", "Authorization: Bearer a:b") == 0
    assert triton.received[0].headers["authorization"] == "Bearer a:b"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", "invalid"], 2, "error: height=7 is not a multiple of 16; use 0 or 16\n"),
        (["--prompt", "crash"], 1, "error: the worker group died\n"),
        (["--prompt", "midway"], 1, "error: the worker group died\n"),
        (["--prompt", "too much"], 1, "error: the queue is full; come back later\n"),
        (["--prompt", "x", "--stream-model", "other"], 1, "--no-stream"),
        (["--prompt", "x", "--no-stream", "--model", "other"], 1, "unknown model: 'other'"),
        (["--prompt", "slow", "--timeout-s", "0.1"], 1, "--timeout-s"),
        (["--prompt", "too late"], 1, "error: DEADLINE_EXCEEDED: deadline_s=3 cannot be met; try again later; allow"),
        (["--prompt", "too late", "--no-stream"], 1, "--deadline-s"),
        (["--prompt", "midway too late"], 1, "--deadline-action continue"),
        (["--prompt", "taken back"], 1, "error: cancelled in denoising after 3 steps\n"),
        (["--prompt", "x", "--prompt", "y", "--request-id", "r1"], 2, "--request-id r1 names one request, but 2"),
        (["--prompt", "x", "--timeout-s", "0"], 2, "timeout_s=0"),
        (["--prompt", "x", "--seed", str(2**63)], 2, "does not fit into INT64"),
        (["--prompt", "x", "--url", "http://here:1"], 2, "protocol='http'"),
        (["--prompt", "x", "--output", "a.jpg", "--output-format", "png"], 2, "change one"),
        (["--prompt", "x", "--output", "a.mp4", "--output-format", "gif"], 2, "a mp4 file"),
        (["--prompt", "x", "--image", "none.png"], 2, "--image none.png: No such file or directory"),
        (["--prompt", "x", "--image", "/"], 2, "--image /: Is a directory"),
        (["--prompt", "x", "--model", "other"], 1, "unknown model: 'other_stream'"),
        (["--prompt", "x", "--prompt", "y", "--output", "a.jpg"], 2, "name a folder"),
        (["--prompt", "x", "--output", "/proc/none/pictures"], 1, "/proc/none"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    triton: TritonDouble, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert run(triton, *arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_one_failing_prompt_does_not_take_the_others_along(
    triton: TritonDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(triton, "--prompt", "crash", "--prompt", "x", "--prompt", "invalid", "--quiet") == 2
    printed = capsys.readouterr()
    assert printed.out == "outputs/x-7.png\n"
    assert "error: 'crash': the worker group died\n" in printed.err
    assert "error: 'invalid': height=7" in printed.err


def test_an_unreachable_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--prompt", "x", "--url", "127.0.0.1:1", "--retries", "0"]) == 1
    printed = capsys.readouterr().err
    assert "127.0.0.1:1" in printed
    assert "triton-diffusion serve" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate"],
        ["paint"],
        ["generate", "--prompt", "x", "--height", "tall"],
        ["generate", "--prompt", "x", "--output-format", "bmp"],
        ["generate", "--prompt", "x", "--output-format", "raw"],
        ["generate", "--prompt", "x", "--num-frames", "many"],
        ["generate", "--prompt", "x", "--concurrency", "0"],
        ["generate", "--prompt", "x", "--header", "nothing"],
        ["generate", "--prompt", "x", "--deadline-action", "hurry"],
        ["generate", "--prompt", "x", "--priority", "high"],
        ["cancel"],
        ["cancel", "r1", "r2"],
        ["cancel", "r1", "--protocol", "ftp"],
        ["families", "a", "b"],
        ["load"],
        ["load", "wan", "flux"],
        ["unload", "--url", "127.0.0.1:1"],
    ],
)
def test_wrong_usage_ends_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: triton-diffusion" in capsys.readouterr().err


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-m", "triton_diffusion_client", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ctrl_c_cancels_the_requests_and_exits_with_130(triton: TritonDouble, protocol: str) -> None:
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    process = start(
        *["generate", "--url", url, "--protocol", protocol, "--num-inference-steps", "1000"],
        *["--prompt", "slow", "--prompt", "slow"],
    )
    deadline_s = time.monotonic() + 30
    while len(triton.received) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors == "error: interrupted; the requests under way were cancelled\n"
    assert [request.cancelled.wait(2) for request in triton.received] == [True, True]


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("triton-diffusion ")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("generate", ["--priority", "--deadline-s", "--deadline-action", "--request-id", "--cancel-scope"]),
        ("generate", ["--image", "--num-frames", "--fps", "--flow-shift", "--strength", "--model"]),
        (
            "cancel",
            ["REQUEST_ID", "--cancel-scope", "--model", "--cancellation-model", "--url", "--protocol", "--timeout-s"],
        ),
    ],
)
def test_help_names_the_flags_and_says_what_an_empty_scope_means(
    command: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(flag in printed for flag in flags)
    assert "default: empty" in printed
    assert "id is then the only secret" in printed


def cancel(triton: TritonDouble, *arguments: str, protocol: str = "grpc") -> int:
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    return cli.main(["cancel", *arguments, "--url", url, "--protocol", protocol])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("scope", [[], ["--cancel-scope", "team"]], ids=["no scope", "a scope"])
def test_cancel_takes_back_a_request_of_another_process(
    triton: TritonDouble, capsys: pytest.CaptureFixture[str], protocol: str, scope: list[str]
) -> None:
    arguments = ["--prompt", "slow", "--num-inference-steps", "1000", "--request-id", "r1", *scope]
    process = start("generate", "--url", triton.grpc_url, *arguments)
    deadline_s = time.monotonic() + 30
    while not triton.received and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert cancel(triton, "r1", "--cancel-scope", "others", protocol=protocol) == 1
    assert process.poll() is None
    capsys.readouterr()
    assert cancel(triton, "r1", *scope, protocol=protocol) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("cancelled r1\n", "")
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert errors.startswith("error: cancelled in denoising after ")


def test_cancel_says_when_there_is_nothing_to_cancel(triton: TritonDouble, capsys: pytest.CaptureFixture[str]) -> None:
    assert cancel(triton, "r1") == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "no request r1 is waiting or running under this scope\n")
    assert triton.received[0].inputs["request_id"] == ("BYTES", [1], "r1")
    assert triton.received[0].parameters == {}


def test_cancel_asks_the_model_of_a_chain(triton: TritonDouble) -> None:
    assert cancel(triton, "r1", "--model", "wan") == 1
    assert triton.received[0].model == "wan_cancellation"


def test_cancel_sends_headers_scope_and_time_out(triton: TritonDouble) -> None:
    flags = ["--cancel-scope", "team", "--header", "Authorization: Bearer a:b", "--timeout-s", "30"]
    assert cancel(triton, "r1", *flags) == 1
    request = triton.received[0]
    assert request.parameters == {"cancel_scope": "team", "timeout": 30_000_000}
    assert request.headers["authorization"] == "Bearer a:b"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--cancellation-model", "other"], 1, "or the model that cancels with --cancellation-model"),
        (["--timeout-s", "0"], 2, "timeout_s=0"),
        (["--url", "127.0.0.1:1"], 1, "cannot reach a server at 127.0.0.1:1"),
        (["--url", "http://here:1"], 2, "protocol='http'"),
    ],
)
def test_a_cancel_that_fails_is_one_line_and_an_exit_code(
    triton: TritonDouble, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.main(["cancel", "r1", "--url", triton.grpc_url, *arguments]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.fixture
def server_commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Namespace]]:
    """A double of the server's side, which keeps what it was called with."""
    calls: list[tuple[str, Namespace]] = []
    commands: Any = types.ModuleType("triton_diffusion.commands")

    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--model-path")

    def remember(name: str, code: int) -> Any:
        return lambda args: calls.append((name, args)) or code

    commands.add_serve_arguments = commands.add_build_repository_arguments = add_arguments
    commands.serve, commands.build_repository = remember("serve", 3), remember("build_repository", 4)
    package: Any = types.ModuleType("triton_diffusion")
    package.commands = commands
    monkeypatch.setitem(sys.modules, "triton_diffusion", package)
    monkeypatch.setitem(sys.modules, "triton_diffusion.commands", commands)
    return calls


def test_server_commands_are_handed_on(server_commands: list[tuple[str, Namespace]]) -> None:
    assert cli.main(["serve", "--model-path", "a"]) == 3
    assert cli.main(["build-repository", "--model-path", "b"]) == 4
    assert [(name, args.model_path) for name, args in server_commands] == [("serve", "a"), ("build_repository", "b")]


@pytest.mark.parametrize("command", ["serve", "build-repository"])
def test_server_commands_say_what_to_install(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton_diffusion", None)
    assert cli.main([command]) == 1
    assert 'pip install "triton-diffusion[server]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("A red circle, left of a blue star!", "a-red-circle-left-of-a-blue-star"),
        ("ein Käfer", "ein-käfer"),
        ("../../etc/passwd", "etc-passwd"),
        ("under_score\nand\ttab", "under-score-and-tab"),
        ("赤い丸", "赤い丸"),
        ("", "picture"),
        ("\N{LARGE RED CIRCLE}", "picture"),
        ("word " * 30, "-".join(["word"] * 12)),
        ("x" * 300, "x" * 60),
    ],
)
def test_a_file_name_begins_like_the_prompt(prompt: str, slug: str) -> None:
    assert slugify(prompt) == slug


def test_no_file_name_is_too_long_for_a_file_system() -> None:
    assert len(slugify("\N{CJK UNIFIED IDEOGRAPH-8D64}" * 500).encode()) <= 180
    assert len(slugify("\U00020000" * 500).encode()) <= 180


def test_the_output_is_a_file_or_a_folder() -> None:
    assert plan_output("outputs/", None, 3) == OutputFiles(Path("outputs"), False, None)
    assert plan_output("new", "webp", 1) == OutputFiles(Path("new"), False, "webp")
    assert plan_output("a.JPG", None, 1) == OutputFiles(Path("a.JPG"), True, "jpeg")
    assert plan_output("a.mp4", None, 1) == OutputFiles(Path("a.mp4"), True, "mp4")
    Path("folder.png").mkdir()
    assert not plan_output("folder.png", None, 2).is_file
    Path("notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes\.txt is a file"):
        plan_output("notes.txt", None, 1)


def test_pictures_in_a_folder_are_never_overwritten() -> None:
    files = OutputFiles(Path("folder"), False, None)
    threads = [threading.Thread(target=files.save_output, args=(b"%d" % n, "x", 1)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contents = sorted(path.read_bytes() for path in Path("folder").iterdir())
    assert contents == [b"%d" % n for n in range(10)]


def test_a_named_file_is_overwritten() -> None:
    files = OutputFiles(Path("sub/a.png"), True, "png")
    files.save_output(b"first", "x", 1)
    assert files.save_output(b"second", "x", 2).read_bytes() == b"second"
