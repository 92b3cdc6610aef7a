"""The server's commands: `serve` and `build-repository`. The command line itself is the client package's."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

from triton_diffusion import repository
from triton_diffusion._admin import KEY_HEADER, KEY_VARIABLE, RESTRICTED_APIS, hides_processes
from triton_diffusion._passed_on import check_passed_on
from triton_diffusion.config import DEGREES, ChainConfig, DenoisingLoop, Dtype, PolicyName, StageConfig, VaeTiling
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.registry import check_checkpoint, check_parallel, find_family
from triton_diffusion.loading.checkpoint import DEMO, Checkpoint, open_checkpoint
from triton_diffusion.runtime.work import STAGE_MODELS
from triton_diffusion.server import StartProgress, TritonServer, describe_exit
from triton_diffusion.supervisor import Supervisor

_LOG_ARGUMENTS = {
    "debug": ["--log-verbose=1"],
    "info": [],
    "warning": ["--log-info=false"],
    "error": ["--log-info=false", "--log-warning=false"],
}
# Our files are complete; completing them would start every model twice.
_COMPLETE = ["--disable-auto-complete-config"]
_DEFAULTS = {field.name: field.default for config in (ChainConfig, StageConfig) for field in fields(config)}


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`. Where `sglang serve` has the same thing, the flag has the same name."""
    _add_model_arguments(parser)
    parser.add_argument(
        "--model-repository",
        metavar="FOLDER",
        help="serve this model repository as it is, instead of building one",
    )
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)"
    )
    group.add_argument("--port", type=_port, default=8000, help="HTTP port (default: %(default)s)")
    group.add_argument("--grpc-port", type=_port, default=8001, help="gRPC port (default: %(default)s)")
    group.add_argument("--metrics-port", type=_port, default=8002, help="Prometheus port (default: %(default)s)")
    group.add_argument("--log-level", choices=list(_LOG_ARGUMENTS), default="info", help="default: %(default)s")
    group.add_argument("--log-file", metavar="FILE", help="append the server's log to FILE instead of stderr")
    group.add_argument(
        "--exit-timeout-s",
        type=int,
        default=300,
        metavar="S",
        help="seconds that requests under way have when the server is told to end (default: %(default)s)",
    )
    group.add_argument(
        "--startup-timeout-s", type=int, metavar="S", help="seconds that loading may take (default: 1800)"
    )
    group.add_argument(
        "--admin-key",
        default=os.environ.get(KEY_VARIABLE) or None,
        metavar="KEY",
        help=f"opens Triton's {', '.join(RESTRICTED_APIS)} to requests with the header {KEY_HEADER}: KEY (over gRPC "
        f"triton-grpc-protocol-{KEY_HEADER}); also ${KEY_VARIABLE}. tritonserver gets it as an argument, that users "
        "of this machine can see (default: a random key, so that they are closed)",
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=5,
        metavar="N",
        help="how often in 10 minutes a server that died is started again before it is given up (default: %(default)s)",
    )
    group.add_argument(
        "--tritonserver",
        metavar="FILE",
        help="the server's program (default: $TRITONSERVER, PATH, the image's, the wheel's)",
    )
    parser.add_argument(
        "tritonserver_arguments",
        nargs="*",
        metavar="-- ARGUMENT",
        help="anything else for tritonserver, after --, but for what serve sets itself; of --http-restricted-api and "
        "--grpc-restricted-protocol, what they do not name stays as --admin-key says",
    )


def serve(args: argparse.Namespace) -> int:
    """Serve until a signal comes or the server ends; returns the server's exit code, 2 for a wrong configuration."""
    return _reporting_mistakes(_serve, args)


def add_build_repository_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `build-repository`."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write the model repository")
    parser.add_argument(
        "--force", action="store_true", help="replace models of the same names in a folder made by others"
    )
    _add_model_arguments(parser)


def build_repository(args: argparse.Namespace) -> int:
    """Write a model repository for a checkpoint, for `tritonserver --model-repository`."""
    return _reporting_mistakes(_build_repository, args)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")

    def add(name: str, kind: Callable[[str], object], text: str, choices: tuple[str, ...] | None = None) -> None:
        default = _DEFAULTS[name]
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            choices=choices,
            metavar=None if choices else name.rpartition("_")[2].upper(),
            help=f"{text} (default: {default})" if default != "" else text,
        )

    add(
        "model_path",
        str,
        'checkpoint folder in diffusers layout, hub id, or "demo" for the built-in checkpoint',
    )
    group.add_argument(
        "--name",
        default=repository.DEFAULT_NAME,
        help='what the checkpoint is called: requests go to the model of this name, as in "wan" (default: %(default)s)',
    )
    group.add_argument(
        "--no-image-input",
        action="store_true",
        help="requests bring no pictures, and what would encode them is not loaded",
    )
    add("num_gpus", int, "ranks of a stage in all, one a GPU; without a GPU, processes on the CPU")
    add("dp_size", int, "replicas that share them; 0: as many as the degrees below allow")
    add("gpu_device_ids", str, 'GPUs of each replica, as in "0,1;2,3"; default: the first ones')
    add("tp_size", int, "tensor parallelism of the transformer: ranks that share each weight matrix")
    add("ulysses_degree", int, "ranks that share the sequence and swap it for heads; 0: what the others leave over")
    add("ring_degree", int, "ranks that share the sequence and pass keys and values round")
    group.add_argument(
        "--enable-cfg-parallel",
        action="store_const",
        const="true",
        help="two halves of the ranks, for the conditional and the unconditional predictions of guidance",
    )
    group.add_argument(
        "--text-encoder-tp-size", type=int, metavar="SIZE", help="ranks that share the text encoder (default: 1)"
    )
    group.add_argument(
        "--vae-parallel-size",
        type=int,
        metavar="SIZE",
        help="ranks that share the tiles of a picture, to decode one or to encode a given one (default: 1)",
    )
    add(
        "vae_tiling",
        str,
        "decode in tiles, which takes less memory; auto: where several ranks share them. For slicing, one picture or "
        "video after the other, --set decoding.max_batch_tokens=1",
        get_args(VaeTiling),
    )
    add("attention_backend", str, "auto, torch_sdpa, cudnn, flash_attn, sage_attn or flex")
    add("dtype", str, "compute type of the weights", get_args(Dtype))
    add("num_threads", int, "torch threads of a rank on the CPU; 0: the cores divided by the ranks")
    add("max_batch_tokens", int, "tokens (rows x sequence length) in one forward pass at most; 0: measured at start")
    add("max_queue_size", int, "requests that may wait or run in a stage")
    add("max_queue_cost", int, "their tokens x steps; 0: four times those of max_queue_size default requests")
    add("max_concurrent_requests", int, "requests that may wait or run in all stages together")
    add(
        "scheduling_policy",
        str,
        "choose anew at every step by priority and due time, by turns of the sizes, or first come, first served",
        get_args(PolicyName),
    )
    add("slowdown", float, "a request is due after so many times the time that it needs alone")
    add("priority_ageing_s", float, "seconds overdue that raise a priority by 1")
    add(
        "warmup_resolutions",
        str,
        'WIDTHxHEIGHT,... to run before the server is ready, or "none"; default: the size of the checkpoint',
    )
    add("prompt_cache_bytes", int, "embeddings kept for prompts that come again; 0: none")
    add(
        "denoising_loop",
        str,
        "form the batch anew at every step, or run one request after the other",
        get_args(DenoisingLoop),
    )
    add("max_pixels", int, "height x width of one picture at most")
    add("max_num_inference_steps", int, "denoising steps of one request at most")
    add("max_num_frames", int, "frames of a video at most")
    add("max_num_outputs", int, "pictures or videos of one request at most")
    add("max_image_pixels", int, "height x width of all pictures together that a request brings at most")
    add("max_pixel_steps", int, "height x width x frames x outputs x steps of a request at most")
    group.add_argument(
        "--response-cache",
        type=_size_bytes,
        metavar="SIZE",
        help="answer equal requests from Triton's response cache of this size, as in 256MB; "
        "requests must then carry a seed (default: no cache)",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[MODEL.]NAME=VALUE",
        dest="settings",
        help="any other parameter of the models' config.pbtxt, in all models or in one; may be repeated",
    )


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """The parameters to set: those that were given, so that the defaults stay in one place, the config.pbtxt files."""
    settings = {name: str(value) for name in _DEFAULTS if (value := getattr(args, name, None)) is not None}
    given: dict[str, str] = {}
    for item in args.settings:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigurationError(f"--set {item!r} must be NAME=VALUE or MODEL.NAME=VALUE")
        given[name.strip()] = value
    settings = _of_stages(settings, args.text_encoder_tp_size, args.vae_parallel_size) | given
    if "model_path" in settings:
        settings["model_path"] = _absolute_if_folder(settings["model_path"])
    return settings


def _of_stages(settings: dict[str, str], text_tp_size: int | None, vae_size: int | None) -> dict[str, str]:
    """Parallel degrees are for denoising. The other stages have as many replicas, of ranks of their own number, which
    run on the first GPUs of each replica.
    """
    degrees = {name: settings.pop(name) for name in DEGREES if name in settings}
    sizes = dict.fromkeys(STAGE_MODELS, 1) | dict.fromkeys(("decoding", "image_encoding"), vae_size or 1)
    sizes["text_encoding"] = text_tp_size or 1
    del sizes["denoising"]
    if not degrees and sum(sizes.values()) == len(sizes) and settings.get("dp_size", "0") == "0":
        return settings
    placing = {name: settings.pop(name) for name in ("num_gpus", "dp_size", "gpu_device_ids") if name in settings}
    try:
        denoising = StageConfig.from_parameters(placing | degrees)
    except ConfigurationError as error:
        raise ConfigurationError(f"denoising: {error}") from error
    settings |= {f"denoising.{name}": value for name, value in (placing | degrees).items()}
    for model, size in sizes.items():
        if size < 1 or size > denoising.ranks_per_replica:
            raise ConfigurationError(
                f"{model} cannot have {size} ranks a replica: there are {denoising.ranks_per_replica} GPUs in one; "
                "give more GPUs, or a smaller --text-encoder-tp-size or --vae-parallel-size"
            )
        settings[f"{model}.num_gpus"] = str(size * denoising.num_replicas)
        settings[f"{model}.dp_size"] = str(denoising.num_replicas)
        settings[f"{model}.gpu_device_ids"] = ";".join(",".join(ids[:size]) for ids in denoising.device_ids())
    if sizes["text_encoding"] > 1:
        settings["text_encoding.tp_size"] = str(sizes["text_encoding"])
    return settings


def _absolute_if_folder(model_path: str) -> str:
    folder = Path(model_path).expanduser()
    return str(folder.resolve()) if model_path != DEMO and folder.is_dir() else model_path


def _serve(args: argparse.Namespace) -> int:
    check_passed_on(args.tritonserver_arguments, has_response_cache=args.response_cache is not None)
    settings = _settings(args)
    if args.model_repository is None:
        with tempfile.TemporaryDirectory(prefix="triton-diffusion-models-") as folder:
            # A checkpoint that cannot be served is better known before a server starts; a hub id is downloaded here.
            _write_repository(args, folder, settings, open_checkpoint(settings.get("model_path", DEMO)))
            return _run_server(args, Path(folder), settings, _COMPLETE, temporary_folders=[folder])
    ineffective = sorted(set(settings) - {"startup_timeout_s"})
    if ineffective:
        raise ConfigurationError(
            f"{', '.join(ineffective)} cannot be set with --model-repository={args.model_repository}; "
            "set it in that folder's config.pbtxt files, or leave out --model-repository"
        )
    given = Path(args.model_repository)
    return _run_server(args, given, settings, _COMPLETE if repository.is_built(given) else [])


def _run_server(
    args: argparse.Namespace,
    model_repository: Path,
    settings: dict[str, str],
    arguments: list[str],
    *,
    temporary_folders: Sequence[str] = (),
) -> int:
    max_concurrent_requests = int(settings.get("max_concurrent_requests", ChainConfig.max_concurrent_requests))
    server = TritonServer(
        model_repository,
        host=args.host,
        http_port=args.port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        executable=args.tritonserver,
        log_file=args.log_file,
        exit_timeout_s=args.exit_timeout_s,
        thread_pool_size=2 * max_concurrent_requests + 16,
        response_cache_bytes=args.response_cache or 0,
        extra_arguments=[*arguments, *_LOG_ARGUMENTS[args.log_level], *args.tritonserver_arguments],
        temporary_folders=temporary_folders,
        admin_key=args.admin_key,
    )
    _warn_about_shared_memory()
    # The stages give up first, and say which of them and why.
    startup_timeout_s = float(settings.get("startup_timeout_s", 1800)) + 60
    with server.forwarding_signals(), server:
        progress = ProgressLine(is_alone=args.log_file is not None)
        try:
            server.wait_until_ready(startup_timeout_s, progress.show)
        except ConfigurationError:
            if server.stop_requested.is_set():
                return _exit_status(server, server.wait())
            raise
        finally:
            progress.end()
        print(
            f"ready\n  HTTP     http://{server.http_address}\n  gRPC     {server.grpc_address}\n"
            f"  metrics  {server.metrics_url}\n{_who_can_reach(args)}",
            flush=True,
        )
        supervisor = Supervisor(server, _report, max_restarts=args.max_restarts, startup_timeout_s=startup_timeout_s)
        return _exit_status(server, supervisor.run())


def _report(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {line}", file=sys.stderr, flush=True)


def _who_can_reach(args: argparse.Namespace) -> str:
    """What an operator must know about who can do what."""
    if args.host in ("127.0.0.1", "::1", "localhost"):
        reach = "only programs on this machine can reach it; --host 0.0.0.0 opens it to others"
    else:
        reach = f"listens on {args.host}: whoever can reach it there can send requests, without authentication"
    how = "with the admin key" if args.admin_key else f"to everybody; --admin-key or ${KEY_VARIABLE} sets a key"
    state = "open" if args.admin_key else "closed"
    lines = [reach, f"{', '.join(RESTRICTED_APIS)} are {state} {how}"]
    if not hides_processes(Path("/proc/self/mounts").read_text(encoding="utf-8")):
        lines.append(
            "other users of this machine can read that key in tritonserver's arguments, unless /proc has hidepid=2"
        )
    return "\n".join(f"  {line}" for line in lines)


def _exit_status(server: TritonServer, exit_code: int | None) -> int:
    if exit_code == 0 or server.stop_requested.is_set():
        return max(exit_code or 0, 0)
    print(
        f"error: tritonserver {describe_exit(exit_code)}; the end of its log:\n{server.log_tail()}",
        file=sys.stderr,
    )
    assert exit_code is not None
    return exit_code if exit_code > 0 else 128 - exit_code


def _write_repository(
    args: argparse.Namespace,
    folder: str,
    settings: dict[str, str],
    checkpoint: Checkpoint | None,
    *,
    force: bool = False,
) -> Path:
    """Build the repository of a checkpoint, which must be one that can be served.

    checkpoint: None if it is not here: then there are models for all stages, and those it does not have will be idle.

    Raises:
        ConfigurationError: it cannot be served, or not like this.
    """
    stages = set(STAGE_MODELS)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
        stages = set(find_family(checkpoint).stage_components(checkpoint))
    if args.no_image_input:
        stages.discard("image_encoding")
        if checkpoint is not None:
            find_family(checkpoint).request_defaults(checkpoint, takes_images=False)
    path = repository.build_repository(
        folder,
        settings,
        name=args.name,
        stages=stages,
        force=force,
        response_cache=args.response_cache is not None,
    )
    if checkpoint is not None:
        check_parallel(checkpoint, repository.read_stage_configs(path, args.name))
    return path


def _build_repository(args: argparse.Namespace) -> int:
    settings = _settings(args)
    model_path = settings.get("model_path", DEMO)
    # The checkpoint of a hub id may be on another machine, where the server will run.
    is_here = model_path == DEMO or Path(model_path).is_dir()
    checkpoint = open_checkpoint(model_path) if is_here else None
    folder = _write_repository(args, args.output, settings, checkpoint, force=args.force)
    cached = args.response_cache is not None
    cache = f" --response-cache {args.response_cache}" if cached else ""
    print(f"{folder}\nserve it: triton-diffusion serve --model-repository {folder}{cache}")
    return 0


class ProgressLine:
    """The start on one line that is drawn anew, or on a line for every model where the line would not stay whole."""

    def __init__(self, *, is_alone: bool) -> None:
        self._redraws = is_alone and sys.stderr.isatty()
        self._num_shown = 0

    def show(self, progress: StartProgress) -> None:
        """Draw it."""
        if self._redraws:
            names = ", ".join(progress.loaded_models) or "no model yet"
            sys.stderr.write(f"\r\x1b[Kstarting: {progress.elapsed_s:.0f} s, loaded: {names}")
            sys.stderr.flush()
        else:
            for name in progress.loaded_models[self._num_shown :]:
                print(f"starting: loaded {name} after {progress.elapsed_s:.1f} s", file=sys.stderr, flush=True)
        self._num_shown = len(progress.loaded_models)

    def end(self) -> None:
        """Leave an empty line."""
        if self._redraws:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _warn_about_shared_memory(needed_bytes: int = 256 * 2**20) -> None:
    folder = "/dev/shm"
    if os.path.isdir(folder) and (free := shutil.disk_usage(folder).free) < needed_bytes:
        print(
            f"warning: {folder} has {free // 2**20} MB left, and the models exchange their data through it; "
            "256 MB or more is better (docker run --shm-size=1g)",
            file=sys.stderr,
        )


def _size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([kmg]?)i?b?", text.strip().lower())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give bytes, or as in 64MB, 2GB")
    return int(match[1]) * {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}[match[2]]


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError(f"{port} is not a port between 1 and 65535")
    return port


def _reporting_mistakes(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        return command(args)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
