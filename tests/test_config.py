"""StageConfig and ChainConfig from the parameters of a config.pbtxt."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from triton_diffusion.config import ChainConfig, ParallelConfig, RequestLimits, StageConfig
from triton_diffusion.errors import ConfigurationError


def test_no_parameters_give_the_defaults() -> None:
    assert StageConfig.from_parameters({}) == StageConfig()
    assert ChainConfig.from_parameters({}) == ChainConfig()


@pytest.mark.parametrize("config_class", [StageConfig, ChainConfig])
def test_every_field_is_read_back_from_its_text(config_class: type[StageConfig] | type[ChainConfig]) -> None:
    changed = {
        "dtype": "float32",
        "denoising_loop": "reference",
        "gpu_device_ids": ";".join([",".join(map(str, range(16)))] * 2),
        "num_gpus": "32",
        "dp_size": "2",
        "tp_size": "2",
        "ring_degree": "2",
        "ulysses_degree": "2",
        "enable_cfg_parallel": "True",
        # For replicas of one rank, which have no degrees.
        "num_cores": "0",
        "pack_linears": "False",
        "take_turns": "False",
        "spare_ranks": "False",
        "vae_tiling": "on",
        "scheduling_policy": "fifo",
        "warmup_resolutions": "1024x1024,512x768",
    }
    parameters = {}
    for field in dataclasses.fields(config_class):
        default = field.default
        other = default + "x" if isinstance(default, str) else str(default + 1)  # type: ignore[operator]
        parameters[field.name] = changed.get(field.name, other)
    config = config_class.from_parameters(parameters)
    assert {name: str(value) for name, value in dataclasses.asdict(config).items()} == parameters


def test_an_unknown_parameter_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigurationError, match=r"'max_batchtokens'.*did you mean max_batch_tokens\?"):
        StageConfig.from_parameters({"max_batchtokens": "4"})


def test_a_parameter_of_the_other_model_is_unknown() -> None:
    with pytest.raises(ConfigurationError, match="max_pixels"):
        StageConfig.from_parameters({"max_pixels": "4"})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("num_gpus", "two", "int"),
        ("num_gpus", "1.5", "int"),
        ("num_gpus", "", "int"),
        ("startup_timeout_s", "soon", "float"),
        ("enable_cfg_parallel", "yes", "true or false"),
        ("dtype", "bf16", "auto, bfloat16, float16, float32"),
        ("denoising_loop", "fast", "step_batching, reference"),
    ],
)
def test_a_text_that_is_no_value_is_refused_with_what_is_expected(name: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        StageConfig.from_parameters({name: text})
    assert f"{name}={text!r}" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["max_queue_size", "startup_timeout_s", "priority_ageing_s", "slowdown"])
@pytest.mark.parametrize("text", ["0", "-1"])
def test_counts_and_times_must_be_positive(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=.*greater than 0"):
        StageConfig.from_parameters({name: text})


def test_a_timeout_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="startup_timeout_s"):
        StageConfig.from_parameters({"startup_timeout_s": "nan"})


@pytest.mark.parametrize(
    "name",
    [
        *("num_gpus", "dp_size", "num_threads", "num_cores", "ulysses_degree"),
        *("max_batch_tokens", "max_queue_cost", "prompt_cache_bytes"),
    ],
)
def test_zero_chooses_where_a_negative_number_is_refused(name: str) -> None:
    StageConfig.from_parameters({name: "0"})
    with pytest.raises(ConfigurationError, match=f"{name}=-1"):
        StageConfig.from_parameters({name: "-1"})


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(ChainConfig) if isinstance(field.default, int)]
)
def test_limits_of_the_chain_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=0"):
        ChainConfig.from_parameters({name: "0"})


def test_every_rank_is_a_replica_unless_dp_size_says_otherwise() -> None:
    config = StageConfig(num_gpus=4)
    assert (config.num_replicas, config.ranks_per_replica) == (4, 1)
    assert config.device_ids() == [["0"], ["1"], ["2"], ["3"]]


def test_dp_size_divides_the_ranks_into_replicas() -> None:
    config = StageConfig(num_gpus=4, dp_size=2)
    assert (config.num_replicas, config.ranks_per_replica) == (2, 2)
    assert config.device_ids() == [["0", "1"], ["2", "3"]]


def test_dp_size_must_divide_num_gpus() -> None:
    with pytest.raises(ConfigurationError, match=r"dp_size=2 does not divide num_gpus=3"):
        StageConfig(num_gpus=3, dp_size=2)


def test_more_replicas_than_ranks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="dp_size=4"):
        StageConfig(num_gpus=2, dp_size=4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ParallelConfig()),
        ({"tp_size": 2}, ParallelConfig(tp=2)),
        ({"num_gpus": 4, "dp_size": 2, "ring_degree": 2}, ParallelConfig(ring=2)),
        ({"num_gpus": 4, "enable_cfg_parallel": True, "ulysses_degree": 2}, ParallelConfig(cfg=2, ulysses=2)),
        (
            {"num_gpus": 48, "dp_size": 3}
            | {"enable_cfg_parallel": True, "ring_degree": 2, "ulysses_degree": 2, "tp_size": 2},
            ParallelConfig(cfg=2, ring=2, ulysses=2, tp=2),
        ),
    ],
)
def test_the_ranks_are_all_degrees_multiplied(values: dict[str, int], expected: ParallelConfig) -> None:
    config = StageConfig(**values)  # type: ignore[arg-type]
    assert config.parallel("denoising") == expected
    assert config.num_ranks == config.num_replicas * expected.num_ranks


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"num_gpus": 4, "dp_size": 1, "tp_size": 3},
            "num_gpus=4 must be dp x cfg x ring x ulysses x tp, and is not dp=1 x cfg=1 x ring=1 x ulysses=1 x tp=3",
        ),
        (
            {"num_gpus": 4, "dp_size": 2, "enable_cfg_parallel": True, "ring_degree": 2},
            "num_gpus=4 must be dp x cfg x ring x ulysses x tp, and is not dp=2 x cfg=2 x ring=2 x ulysses=1 x tp=1",
        ),
        (
            {"num_gpus": 8, "dp_size": 1, "ring_degree": 2, "ulysses_degree": 2},
            "num_gpus=8 must be dp x cfg x ring x ulysses x tp, and is not dp=1 x cfg=1 x ring=2 x ulysses=2 x tp=1",
        ),
    ],
)
def test_degrees_that_do_not_make_up_the_ranks_are_refused_with_all_numbers(
    values: dict[str, int], expected: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        StageConfig(**values).parallel("denoising")  # type: ignore[arg-type]
    assert str(caught.value) == f"{expected}; change num_gpus, dp_size or a degree"


@pytest.mark.parametrize(
    ("stage_model", "values", "expected"),
    [
        ("denoising", {}, ParallelConfig(ulysses=4)),
        ("denoising", {"tp_size": 2}, ParallelConfig(ulysses=2, tp=2)),
        ("denoising", {"enable_cfg_parallel": True, "ring_degree": 2}, ParallelConfig(cfg=2, ring=2)),
        ("text_encoding", {}, ParallelConfig(tp=4)),
        ("decoding", {}, ParallelConfig()),
        ("image_encoding", {}, ParallelConfig()),
    ],
)
def test_ranks_that_no_degree_names_are_for_ulysses_tensors_or_tiles(
    stage_model: str, values: dict[str, int], expected: ParallelConfig
) -> None:
    config = StageConfig(num_gpus=4, dp_size=1, **values)  # type: ignore[arg-type]
    assert config.parallel(stage_model) == expected
    assert config.ranks_per_replica == 4


def test_text_encoding_takes_no_ranks_beside_those_of_its_tensors() -> None:
    with pytest.raises(ConfigurationError, match=r"num_gpus=4 .* is not dp=1 x tp_size=2; change"):
        StageConfig(num_gpus=4, dp_size=1, tp_size=2).parallel("text_encoding")


@pytest.mark.parametrize(
    ("stage_model", "name", "value"),
    [
        ("text_encoding", "ulysses_degree", 2),
        ("text_encoding", "ring_degree", 2),
        ("text_encoding", "enable_cfg_parallel", True),
        ("decoding", "ulysses_degree", 2),
        ("decoding", "ring_degree", 2),
        ("decoding", "enable_cfg_parallel", True),
        ("decoding", "tp_size", 2),
    ],
)
def test_an_axis_that_a_stage_does_not_have_is_refused_by_name(stage_model: str, name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name}={value}.*{stage_model} has (tp_size|tiles)"):
        StageConfig(num_gpus=2, dp_size=1, **{name: value}).parallel(stage_model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parallel", "name"),
    [
        (ParallelConfig(), "one"),
        (ParallelConfig(tp=2), "tp2"),
        (ParallelConfig(ulysses=4, ring=2), "r2.u4"),
        (ParallelConfig(cfg=2, ring=3, ulysses=4, tp=5), "cfg2.r3.u4.tp5"),
    ],
)
def test_a_layout_is_named_by_its_axes_from_slow_links_to_fast_ones(parallel: ParallelConfig, name: str) -> None:
    assert str(parallel) == name


def test_gpu_device_ids_name_the_gpus_of_each_replica() -> None:
    config = StageConfig(num_gpus=4, dp_size=2, gpu_device_ids="6, 7; 2,GPU-8f1")
    assert config.device_ids() == [["6", "7"], ["2", "GPU-8f1"]]


@pytest.mark.parametrize("ids", ["0,1", "0;1;2;3", "0,1;2", "0,1;2,", ",;,", "0,1;2,3;"])
def test_gpu_device_ids_of_another_shape_are_refused(ids: str) -> None:
    with pytest.raises(ConfigurationError, match=r"2 replicas.* of 2 ids"):
        StageConfig(num_gpus=4, dp_size=2, gpu_device_ids=ids)


@pytest.mark.parametrize(
    ("ids", "replicas"), [("0;1", [["0"], ["1"]]), ("0,1;2,3", [["0", "1"], ["2", "3"]]), ("7", [["7"]])]
)
def test_gpu_device_ids_alone_say_how_many_replicas_there_are(ids: str, replicas: list[list[str]]) -> None:
    assert StageConfig(gpu_device_ids=ids).device_ids() == replicas


def test_without_any_number_there_is_one_rank() -> None:
    assert StageConfig().device_ids() == [["0"]]
    assert StageConfig(dp_size=2).device_ids() == [["0"], ["1"]]


def test_warm_up_sizes_are_read_as_width_by_height() -> None:
    assert StageConfig(warmup_resolutions="1024x512, 64x128").warmup_sizes() == [(512, 1024), (128, 64)]
    assert StageConfig().warmup_sizes() is None
    assert StageConfig(warmup_resolutions="none").warmup_sizes() == []


@pytest.mark.parametrize("text", ["1024", "1024x", "1024x1024;512x512", "axb", "1024x1024,,", "-1x5"])
def test_a_warm_up_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="must be WIDTHxHEIGHT"):
        StageConfig(warmup_resolutions=text)


def test_threads_are_shared_between_the_ranks_but_never_none() -> None:
    assert StageConfig(num_gpus=10_000).threads_per_rank == 1
    assert StageConfig(num_gpus=1).threads_per_rank >= 1
    assert StageConfig(num_gpus=10_000, num_threads=3).threads_per_rank == 3


def test_a_batch_waits_for_a_core_for_each_thread_unless_num_cores_says_otherwise() -> None:
    assert StageConfig(num_threads=4).cores_per_rank == 4
    assert StageConfig(num_threads=4, num_cores=2).cores_per_rank == 2
    assert StageConfig(num_gpus=10_000, num_cores=2).cores_per_rank == 1
    with pytest.raises(ConfigurationError, match="num_cores=3 must be at most num_threads=2"):
        StageConfig(num_threads=2, num_cores=3)
    with pytest.raises(ConfigurationError, match="num_cores=1 is for replicas of one rank, not 2"):
        StageConfig(num_gpus=2, dp_size=1, num_cores=1)


def test_the_limits_that_are_documented_are_the_defaults() -> None:
    text = (Path(__file__).parents[1] / ".github" / "SECURITY.md").read_text()
    documented = dict(re.findall(r"^\| `(max_\w+)` \| (\d+) \|", text, re.MULTILINE))
    defaults = {field.name: str(field.default) for field in dataclasses.fields(RequestLimits)}
    assert documented == {name: value for name, value in defaults.items() if name.startswith("max_")}
