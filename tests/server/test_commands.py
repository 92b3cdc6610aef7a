"""The commands `serve` and `build-repository`: flags, mistakes of the operator, and what becomes of both."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from triton_diffusion import commands
from triton_diffusion._admin import hides_processes
from triton_diffusion.config import ChainConfig, StageConfig
from triton_diffusion.loading.checkpoint import DEMO_CHECKPOINT


class ServerDouble:
    """Stands in for TritonServer and keeps what it was started with."""

    starts: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, model_repository: Path, **settings: Any) -> None:
        read = {path.parent.name: path.read_text() for path in Path(model_repository).glob("*/config.pbtxt")}
        self.starts.append({"folder": Path(model_repository), "configs": read, **settings})
        raise commands.ConfigurationError("the double does not start")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(ServerDouble, "starts", [])
    monkeypatch.setattr(commands, "TritonServer", ServerDouble)
    return ServerDouble.starts


def serve(*arguments: str) -> int:
    """As the command line calls it: with `serve` as a subcommand."""
    parser = argparse.ArgumentParser()
    commands.add_serve_arguments(parser.add_subparsers().add_parser("serve"))
    return commands.serve(parser.parse_args(["serve", *arguments]))


def build(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands.add_build_repository_arguments(parser)
    return commands.build_repository(parser.parse_args(["--output", *arguments]))


def test_flags_become_parameters_of_a_temporary_repository(starts, capsys) -> None:
    assert serve("--dtype", "float32", "--max-batch-tokens", "3", "--set", "decoding.num_threads=2") == 2
    (start,) = starts
    assert '"float32"' in start["configs"]["denoising"]
    assert 'key: "num_threads"\n  value {\n    string_value: "2"' in start["configs"]["decoding"]
    assert 'key: "num_threads"\n  value {\n    string_value: "0"' in start["configs"]["denoising"]
    assert not start["folder"].exists(), "it goes with the server"
    assert capsys.readouterr().err == "error: the double does not start\n"


def test_every_model_flag_is_a_parameter(starts) -> None:
    flags = {
        "--model-path": "demo",
        "--num-gpus": "12",
        "--dp-size": "2",
        "--gpu-device-ids": "0,1,2,3,4,5;6,7,8,9,10,11",
        "--tp-size": "3",
        "--ring-degree": "2",
        "--ulysses-degree": "1",
        "--attention-backend": "torch_sdpa",
        "--vae-tiling": "on",
        "--dtype": "bfloat16",
        "--num-threads": "1",
        "--max-batch-tokens": "5",
        "--max-queue-size": "6",
        "--max-queue-cost": "12",
        "--max-concurrent-requests": "13",
        "--scheduling-policy": "fifo",
        "--priority-ageing-s": "14.0",
        "--slowdown": "16.0",
        "--warmup-resolutions": "64x32",
        "--prompt-cache-bytes": "15",
        "--denoising-loop": "reference",
        "--max-pixels": "1024",
        "--max-num-inference-steps": "7",
        "--max-num-outputs": "9",
        "--startup-timeout-s": "11",
    }
    known = {field.name for config in (StageConfig, ChainConfig) for field in dataclasses.fields(config)}
    assert {flag[2:].replace("-", "_") for flag in flags} <= known
    serve(*(item for pair in flags.items() for item in pair))
    text = "".join(starts[0]["configs"].values())
    assert all(f'string_value: "{value}"' in text for value in flags.values())


def parameter(config: str, name: str) -> str:
    match = re.search(rf'key: "{name}"\s+value {{\s+string_value: "([^"]*)"', config)
    assert match is not None, f"{name} is in no config"
    return match[1]


def test_degrees_are_for_denoising_and_the_other_stages_have_a_rank_a_replica(starts) -> None:
    serve("--num-gpus", "8", "--dp-size", "2", "--ring-degree", "2", "--enable-cfg-parallel")
    configs = starts[0]["configs"]
    degrees = ("num_gpus", "dp_size", "ring_degree", "enable_cfg_parallel")
    assert [parameter(configs["denoising"], name) for name in degrees] == ["8", "2", "2", "true"]
    for stage in ("text_encoding", "decoding"):
        placing = [parameter(configs[stage], name) for name in ("num_gpus", "dp_size", "gpu_device_ids")]
        assert placing == ["2", "2", "0;4"]


def test_text_encoder_and_autoencoder_are_shared_by_flags_of_their_own(starts) -> None:
    sizes = ("--text-encoder-tp-size", "2", "--vae-parallel-size", "3")
    serve("--gpu-device-ids", "4,5,6", "--ring-degree", "3", *sizes)
    configs = starts[0]["configs"]
    assert parameter(configs["text_encoding"], "gpu_device_ids") == "4,5"
    assert parameter(configs["text_encoding"], "tp_size") == "2"
    assert parameter(configs["decoding"], "gpu_device_ids") == "4,5,6"


def test_degrees_without_a_number_of_gpus_make_one_replica(starts) -> None:
    serve("--ring-degree", "2", "--enable-cfg-parallel")
    assert parameter(starts[0]["configs"]["denoising"], "ring_degree") == "2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--num-gpus", "2", "--ulysses-degree", "2"),
            "ulysses_degree=2 does not divide num_attention_heads=3; use 1, 3",
        ),
        (("--tp-size", "2"), "tp_size=2 does not divide num_attention_heads=3; use 1, 3"),
        (("--num-gpus", "8", "--tp-size", "3"), "num_gpus=8 must be dp x cfg x ring x ulysses x tp"),
        (("--text-encoder-tp-size", "2"), "text_encoding cannot have 2 ranks a replica: there are 1 GPUs in one"),
        (("--set", "decoding.tp_size=2"), "'decoding.tp_size' is not known"),
        (
            ("--set", "text_encoding.num_gpus=3", "--set", "text_encoding.dp_size=1"),
            "tp_size=3 does not divide num_heads",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_a_server_starts(starts, capsys, flags, message) -> None:
    assert serve(*flags) == 2
    assert not starts
    assert message in capsys.readouterr().err


def test_what_follows_two_dashes_goes_to_tritonserver(starts) -> None:
    serve("--log-level", "warning", "--", "--log-verbose=3", "--trace-config=level=OFF")
    assert starts[0]["extra_arguments"][-3:] == [
        "--log-info=false",
        "--log-verbose=3",
        "--trace-config=level=OFF",
    ]


@pytest.mark.parametrize(
    ("passed_on", "message"),
    [
        (
            ["--http-port=9000"],
            "--http-port=9000 cannot be passed on to tritonserver: serve sets it itself, so give",
        ),
        (["--http-port", "9000"], "--http-port=9000 cannot be passed on"),
        (["--http-p=9000"], "--http-p=9000 cannot be passed on"),
        (["--log-verbose=1", "--grpc-port=9000"], "give --grpc-port before the --"),
        (["--metrics-address=0.0.0.0"], "give --host"),
        (["--model-store=/models"], "give --model-repository before the --"),
        (["--id=mine"], "an id of its own; leave it out"),
        (["--log-file=/tmp/log"], "give --log-file before the --"),
        (["--exit-timeout-secs=1"], "give --exit-timeout-s"),
        (["--model-control-mode=none"], "only in mode explicit; leave it out"),
        (["--model-control-mode", "poll"], "--model-control-mode=poll cannot be passed on"),
        (["--allow-http=False"], "serve asks over HTTP whether the server is ready"),
        (["--http-restricted-api=trace,health:key=x"], "serve itself uses health over HTTP"),
        (["--http-restricted-api", "model-repository:key=x"], "that of --admin-key, which closes model-repository"),
        (["--backend-config=python,shm-region-prefix-name=x"], "the shared memory to clean up"),
        (["--backend-config=python,thread-pool-size=4"], "give --max-concurrent-requests"),
    ],
)
def test_what_serve_sets_or_needs_itself_cannot_be_passed_on(starts, capsys, passed_on, message) -> None:
    assert serve("--", *passed_on) == 2
    assert message in capsys.readouterr().err
    assert not starts


def test_there_is_one_response_cache(starts, capsys) -> None:
    assert serve("--response-cache", "64MB", "--", "--cache-config=local,size=1000000") == 2
    assert "give it the size by --response-cache" in capsys.readouterr().err
    assert not starts
    serve("--", "--cache-config=local,size=1000000")
    assert "--cache-config=local,size=1000000" in starts[0]["extra_arguments"]


@pytest.mark.parametrize(
    "passed_on",
    [
        ["--model-control-mode=explicit"],
        ["--model-control-mode", "explicit", "--load-model", "diffusion"],
        ["--http-restricted-api=inference,statistics:key=x", "--grpc-restricted-protocol=health:key=x"],
        ["--backend-config=python,grpc-timeout-milliseconds=2000"],
        ["--allow-grpc=false", "--allow-metrics=false", "--exit-on-error=false"],
    ],
)
def test_what_serve_can_live_with_is_passed_on(starts, passed_on) -> None:
    serve("--", *passed_on)
    assert starts[0]["extra_arguments"][-len(passed_on) :] == passed_on


@pytest.mark.parametrize(
    ("mounts", "hidden"),
    [
        ("proc /proc proc rw,relatime 0 0", False),
        ("proc /proc proc rw,hidepid=off 0 0", False),
        ("proc /proc proc rw,nosuid,hidepid=invisible,gid=4 0 0", True),
        ("proc /proc proc rw,hidepid=2 0 0\nsysfs /sys sysfs rw 0 0", True),
        ("proc /proc proc rw 0 0\nproc /proc proc rw,hidepid=noaccess 0 0", True),
        ("proc /chroot/proc proc rw,hidepid=2 0 0", False),
    ],
)
def test_whether_other_users_can_read_the_key_is_known_from_the_mount_of_proc(mounts, hidden) -> None:
    assert hides_processes(mounts) is hidden


def test_it_listens_on_loopback_and_tritons_ports_unless_told_otherwise(starts) -> None:
    serve()
    serve("--host", "0.0.0.0", "--port", "9000", "--grpc-port", "9001", "--metrics-port", "9002")
    names = ("host", "http_port", "grpc_port", "metrics_port")
    assert [starts[0][name] for name in names] == ["127.0.0.1", 8000, 8001, 8002]
    assert [starts[1][name] for name in names] == ["0.0.0.0", 9000, 9001, 9002]


def test_calls_to_the_stages_have_threads_for_a_stage_and_a_question_of_every_request(starts) -> None:
    serve("--set", "max_concurrent_requests=200")
    assert starts[0]["thread_pool_size"] == 416


@pytest.mark.parametrize(("size", "size_bytes"), [("1000000", 10**6), ("64MB", 64 * 2**20), ("2 GiB", 2**31)])
def test_a_response_cache_is_for_the_chain_that_answers_once(starts, size, size_bytes) -> None:
    serve("--response-cache", size)
    assert starts[0]["response_cache_bytes"] == size_bytes
    cached = {model for model, text in starts[0]["configs"].items() if "response_cache" in text and "true" in text}
    assert cached == {"diffusion"}


@pytest.mark.parametrize("size", ["0", "much", "-5MB", "1TB"])
def test_a_response_cache_of_no_size_is_refused(starts, size) -> None:
    with pytest.raises(SystemExit):
        serve(f"--response-cache={size}")
    assert not starts


def test_there_is_no_response_cache_unless_asked_for(starts) -> None:
    serve()
    assert starts[0]["response_cache_bytes"] == 0
    assert not any("enable: true" in text for text in starts[0]["configs"].values())


def test_a_relative_checkpoint_folder_becomes_absolute(starts, tmp_path, monkeypatch) -> None:
    shutil.copytree(DEMO_CHECKPOINT, tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    serve("--model-path", "checkpoint")
    assert f'string_value: "{tmp_path / "checkpoint"}"' in starts[0]["configs"]["denoising"]


def test_a_hub_id_stays_as_it_is(tmp_path) -> None:
    assert build(str(tmp_path / "models"), "--model-path", "black-forest-labs/FLUX.1-schnell") == 0
    config = (tmp_path / "models" / "denoising" / "config.pbtxt").read_text()
    assert 'string_value: "black-forest-labs/FLUX.1-schnell"' in config


def test_a_checkpoint_of_an_unknown_family_is_refused_before_a_server_starts(starts, tmp_path, capsys) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "ShapEPipeline"}')
    assert serve("--model-path", str(tmp_path)) == 2
    assert "ShapEPipeline, which no family here serves; known ones are FluxPipeline" in capsys.readouterr().err
    assert not starts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-path", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["--set", "dtype"], "--set 'dtype' must be NAME=VALUE"),
        (["--set", "dtpye=float32"], "did you mean dtype?"),
        (["--num-gpus=-1"], "num_gpus=-1 must not be negative"),
        (
            ["--model-repository", "somewhere", "--dtype", "float32"],
            "dtype cannot be set with --model-repository=somewhere",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(starts, capsys, arguments, message) -> None:
    assert serve(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert starts == []


@pytest.mark.parametrize(
    "arguments", [["--port", "70000"], ["--port", "http"], ["--dtype", "float31"], ["--prot", "1"]]
)
def test_a_wrong_flag_is_refused_by_the_parser(starts, arguments) -> None:
    with pytest.raises(SystemExit) as refusal:
        serve(*arguments)
    assert refusal.value.code == 2
    assert starts == []


def test_build_repository_writes_what_tritonserver_loads(tmp_path, capsys) -> None:
    assert build(str(tmp_path / "models"), "--max-pixels", "65536") == 0
    assert 'string_value: "65536"' in (tmp_path / "models" / "diffusion" / "config.pbtxt").read_text()
    assert str(tmp_path / "models") in capsys.readouterr().out


def test_build_repository_does_not_overwrite_the_work_of_others(tmp_path, capsys) -> None:
    (tmp_path / "precious").write_text("")
    assert build(str(tmp_path)) == 2
    assert "--force" in capsys.readouterr().err
    assert build(str(tmp_path), "--force") == 0


def test_the_commands_do_not_import_torch() -> None:
    """The supervisor of a server is small and starts at once."""
    program = "import sys, triton_diffusion.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
