"""build_repository: the packaged models with other parameters, checked as the models will check them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from triton_diffusion.config import CancellationConfig, ChainConfig, FamiliesConfig, StageConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.repository import build_repository, find_model_repository
from triton_diffusion.request import INPUT_NAMES

STAGES = {"text_encoding", "denoising", "decoding"}
CHAINS = {"diffusion", "diffusion_stream"}
CONFIG_CLASSES: dict[str, Any] = (
    dict.fromkeys({*STAGES, "image_encoding", "prior_generation"}, StageConfig)
    | dict.fromkeys(CHAINS, ChainConfig)
    | {"cancellation": CancellationConfig, "families": FamiliesConfig}
)


def read(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def parameters(folder: Path) -> dict[str, str]:
    return {name: value.string_value for name, value in read(folder).parameters.items()}


@pytest.mark.parametrize("model", sorted(CONFIG_CLASSES))
def test_the_packaged_parameters_are_the_defaults_of_the_code(model) -> None:
    config_class = CONFIG_CLASSES[model]
    assert config_class.from_parameters(parameters(find_model_repository() / model)) == config_class()


@pytest.mark.parametrize("model", sorted(CHAINS))
def test_the_chains_take_every_input_of_a_request(model) -> None:
    inputs = {item.name: item for item in read(find_model_repository() / model).input}
    not_streamed = {"preview_interval"} if model == "diffusion" else set()
    assert set(inputs) == {*INPUT_NAMES, "image"} - not_streamed
    assert [name for name, item in inputs.items() if not item.optional] == ["prompt"]
    assert [name for name, item in inputs.items() if list(item.dims) != [1]] == ["image"]


def test_only_the_stream_is_decoupled() -> None:
    decoupled = {
        model for model in STAGES | CHAINS if read(find_model_repository() / model).model_transaction_policy.decoupled
    }
    assert decoupled == {"diffusion_stream"}


def test_without_settings_the_copy_says_what_the_original_says(tmp_path) -> None:
    build_repository(tmp_path, {})
    for model in CONFIG_CLASSES:
        assert read(tmp_path / model) == read(find_model_repository() / model)
        assert (tmp_path / model / "1" / "model.py").read_text() == (
            find_model_repository() / model / "1" / "model.py"
        ).read_text()


def test_a_setting_reaches_every_model_that_has_it(tmp_path) -> None:
    build_repository(tmp_path, {"model_path": "/checkpoints/flux", "max_batch_tokens": "3", "max_pixels": "65536"})
    assert {parameters(tmp_path / model)["model_path"] for model in STAGES | CHAINS} == {"/checkpoints/flux"}
    assert {parameters(tmp_path / model)["max_batch_tokens"] for model in STAGES} == {"3"}
    assert {parameters(tmp_path / model)["max_pixels"] for model in CHAINS} == {"65536"}
    assert "max_batch_tokens" not in parameters(tmp_path / "diffusion")
    assert "max_pixels" not in parameters(tmp_path / "denoising")


def test_a_setting_with_a_model_goes_before_the_plain_one(tmp_path) -> None:
    build_repository(tmp_path, {"denoising.num_gpus": "2", "num_gpus": "1"})
    assert parameters(tmp_path / "denoising")["num_gpus"] == "2"
    assert parameters(tmp_path / "decoding")["num_gpus"] == "1"


def test_a_value_is_text_and_never_syntax(tmp_path) -> None:
    path = 'a "quoted" \\ path\nwith a line break } and a brace'
    build_repository(tmp_path, {"model_path": path})
    assert parameters(tmp_path / "denoising")["model_path"] == path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bach_tokens": "2"}, r"'max_bach_tokens' is not known \(did you mean max_batch_tokens\?\)"),
        ({"denoisin.dtype": "float32"}, r"no model 'denoisin' \(did you mean denoising\?\)"),
        ({"decoding.denoising_loop": "reference"}, r"'decoding\.denoising_loop' is not known"),
        ({"dtype": "float31"}, r"dtype='float31' must be one of auto, bfloat16, float16, float32"),
        ({"num_gpus": "two"}, r"num_gpus='two' must be int"),
        ({"num_gpus": "3", "dp_size": "2"}, r"dp_size=2 does not divide num_gpus=3"),
        ({"max_num_outputs": "0"}, r"max_num_outputs=0 must be greater than 0"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path, settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_repository(tmp_path / "models", settings)
    assert not (tmp_path / "models").exists()


def test_a_folder_of_its_own_is_built_anew(tmp_path) -> None:
    build_repository(tmp_path, {"dtype": "float32"})
    (tmp_path / "denoising" / "1" / "stale.py").write_text("")
    build_repository(tmp_path, {"num_threads": "2"})
    assert parameters(tmp_path / "denoising")["dtype"] == "auto"
    assert not (tmp_path / "denoising" / "1" / "stale.py").exists()


def test_a_folder_of_others_is_left_alone(tmp_path) -> None:
    (tmp_path / "denoising").mkdir()
    (tmp_path / "denoising" / "mine").write_text("keep me")
    with pytest.raises(ConfigurationError, match="was not made by triton-diffusion"):
        build_repository(tmp_path, {})
    assert [path.name for path in tmp_path.rglob("*")] == ["denoising", "mine"]


def test_force_replaces_the_models_and_leaves_the_rest(tmp_path) -> None:
    (tmp_path / "denoising").mkdir()
    (tmp_path / "denoising" / "mine").write_text("replaced")
    (tmp_path / "other_model").mkdir()
    build_repository(tmp_path, {}, force=True)
    assert not (tmp_path / "denoising" / "mine").exists()
    assert (tmp_path / "other_model").is_dir()
    assert parameters(tmp_path / "denoising")["dtype"] == "auto"


def test_a_destination_that_is_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        build_repository(tmp_path / "models", {})


# Several checkpoints in one repository.


def test_models_of_two_names_stand_side_by_side_and_call_their_own_stages(tmp_path) -> None:
    build_repository(tmp_path / "models", {"max_pixels": "1000"})
    folder = build_repository(tmp_path / "models", {"max_pixels": "2000"}, name="wan")
    assert {"diffusion", "denoising", "wan", "wan_stream", "wan_denoising", "wan_families"} <= set(os.listdir(folder))
    assert read(folder / "wan").name == "wan"
    assert parameters(folder / "wan")["denoising_model"] == "wan_denoising"
    assert parameters(folder / "wan_cancellation")["decoding_model"] == "wan_decoding"
    assert [parameters(folder / name)["max_pixels"] for name in ("diffusion", "wan")] == ["1000", "2000"]
    assert parameters(folder / "diffusion")["denoising_model"] == "denoising"


def test_a_name_is_built_anew_without_the_models_of_others(tmp_path) -> None:
    build_repository(tmp_path / "models", {})
    build_repository(tmp_path / "models", {}, name="wan")
    folder = build_repository(tmp_path / "models", {}, name="wan", stages=("text_encoding", "denoising", "decoding"))
    assert not (folder / "wan_prior_generation").exists()
    assert (folder / "prior_generation").exists()


def test_a_stage_that_is_left_out_is_known_to_nobody(tmp_path) -> None:
    folder = build_repository(tmp_path / "models", {}, stages=("text_encoding", "denoising", "decoding"))
    assert not (folder / "image_encoding").exists()
    for model in ("diffusion", "diffusion_stream", "cancellation", "families"):
        assert parameters(folder / model)["image_encoding_model"] == ""


@pytest.mark.parametrize("name", ["denoising", "families", "a b", "../up", ""])
def test_a_name_that_cannot_be_is_refused(tmp_path, name) -> None:
    with pytest.raises(ConfigurationError, match="name="):
        build_repository(tmp_path / "models", {}, name=name)
    assert not (tmp_path / "models").exists()


def test_a_name_whose_models_are_those_of_another_is_refused(tmp_path) -> None:
    build_repository(tmp_path / "models", {}, name="wan")
    with pytest.raises(ConfigurationError, match=r"wan_stream in .* belongs to 'wan'"):
        build_repository(tmp_path / "models", {}, name="wan_stream")


def test_a_folder_of_a_version_with_one_name_is_built_anew(tmp_path) -> None:
    folder = build_repository(tmp_path / "models", {})
    (folder / ".triton-diffusion.json").write_text('{"models": ["diffusion", "old_stage"]}')
    (folder / "old_stage").mkdir()
    build_repository(folder, {})
    assert not (folder / "old_stage").exists()
    assert (folder / "diffusion").exists()
