"""What each stage demands of its input and promises of its output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from checkpoints.requests import make_request
from checkpoints.stages import alone
from triton_diffusion.config import ChainConfig
from triton_diffusion.errors import DiffusionError, InvalidRequestError, StageError
from triton_diffusion.families.flux import FAMILY
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.loading.components import Components, load_components
from triton_diffusion.stages.base import DenoiseRow, PipelineStage, StageRequest
from triton_diffusion.stages.input_validation import IncomingRequest, InputValidationStage
from triton_diffusion.stages.plan import StagePlan, make_plan


class Recorder(PipelineStage[str]):
    """Writes down the order in which its parts are called."""

    name = "recorder"

    def __init__(self, refuse: str = "") -> None:
        self.calls: list[str] = []
        self._refuse = refuse

    def verify_input(self, item: str) -> None:
        self._note(f"input {item}")

    def forward(self, batch: Sequence[str]) -> None:
        self._note(f"forward {len(batch)}")

    def verify_output(self, item: str) -> None:
        self._note(f"output {item}")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self._refuse:
            raise StageError(call)


def test_a_stage_checks_every_input_then_works_then_checks_every_output() -> None:
    stage = Recorder()
    stage(["a", "b"])
    assert stage.calls == ["input a", "input b", "forward 2", "output a", "output b"]


def test_a_bad_input_is_found_before_any_work_is_done() -> None:
    stage = Recorder(refuse="input b")
    with pytest.raises(StageError):
        stage(["a", "b"])
    assert "forward 2" not in stage.calls


def test_a_bad_output_is_an_error() -> None:
    with pytest.raises(StageError, match="output b"):
        Recorder(refuse="output b")(["a", "b"])


# The stages that need a checkpoint.


@pytest.fixture(scope="module")
def components(flux_checkpoint: Path) -> Components:
    checkpoint = open_checkpoint(str(flux_checkpoint))
    names = {name: None for group in FAMILY.stage_components(checkpoint).values() for name in group}
    return load_components(checkpoint, list(names), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def denoising(components: Components) -> StagePlan:
    return make_plan("denoising", FAMILY, components, alone())


def encoded(components: Components, request: StageRequest) -> StageRequest:
    """The request with its prompts encoded, as the denoising stage gets it."""
    make_plan("text_encoding", FAMILY, components, alone()).on_tick([request])
    return StageRequest(request.request_id, request.request, inputs=dict(request.outputs))


def prepared(denoising: StagePlan, components: Components, **values: object) -> StageRequest:
    """A request behind the stages that run on its admission."""
    item = encoded(components, StageRequest("r", make_request(**values), inputs={}))
    for stage in denoising.on_admission:
        stage([item])
    return item


def test_an_unknown_stage_model_has_no_plan(components: Components) -> None:
    with pytest.raises(ValueError, match="'upscaling'"):
        make_plan("upscaling", FAMILY, components, alone())


def test_input_validation_resolves_a_request(flux_checkpoint: Path) -> None:
    stage = InputValidationStage(FAMILY, FAMILY.defaults(open_checkpoint(str(flux_checkpoint))), ChainConfig())
    item = IncomingRequest({"prompt": "a cat", "negative_prompt": "dark"})
    stage([item])
    assert item.request is not None
    assert (item.request.height, item.request.num_inference_steps) == (32, 28)
    assert len(item.warnings) == 1


def test_input_validation_refuses_what_the_checkpoint_cannot_draw(flux_checkpoint: Path) -> None:
    stage = InputValidationStage(FAMILY, FAMILY.defaults(open_checkpoint(str(flux_checkpoint))), ChainConfig())
    with pytest.raises(InvalidRequestError, match=r"height=30 .* multiple of 4"):
        stage([IncomingRequest({"prompt": "a cat", "height": 30})])


def test_few_steps_are_the_default_without_guidance_embedding_and_dynamic_shift(flux_schnell_checkpoint: Path) -> None:
    defaults = FAMILY.defaults(open_checkpoint(str(flux_schnell_checkpoint)))
    assert (defaults.num_inference_steps, defaults.embedded_guidance_scale) == (4, None)


def test_a_guidance_distilled_checkpoint_has_an_embedded_guidance_scale(flux_dev_checkpoint: Path) -> None:
    defaults = FAMILY.defaults(open_checkpoint(str(flux_dev_checkpoint)))
    assert (defaults.num_inference_steps, defaults.embedded_guidance_scale) == (28, 3.5)


def test_tokens_of_a_row_are_its_text_and_its_patches(
    flux_checkpoint: Path, components: Components, denoising: StagePlan
) -> None:
    request = make_request(height=32, width=64, max_sequence_length=24)
    row = prepared(denoising, components, height=32, width=64, max_sequence_length=24).rows[0]
    num_tokens = row.latents.shape[1] + row.conditioning["prompt_embeds"].shape[1]
    assert FAMILY.num_tokens(request, open_checkpoint(str(flux_checkpoint))) == num_tokens


def test_text_encoding_leaves_finite_embeddings_of_the_asked_length(components: Components) -> None:
    item = StageRequest("r", make_request(max_sequence_length=11, guidance_scale=2.0), inputs={})
    make_plan("text_encoding", FAMILY, components, alone()).on_tick([item])
    assert {name: tuple(tensor.shape) for name, tensor in item.outputs.items()} == {
        "prompt_embeds": (1, 11, 32),
        "pooled_prompt_embeds": (1, 32),
        "negative.prompt_embeds": (1, 11, 32),
        "negative.pooled_prompt_embeds": (1, 32),
    }


def test_text_encoding_refuses_embeddings_that_are_not_finite(components: Components) -> None:
    weight = components["text_encoder_2"].shared.weight
    kept = weight.clone()
    try:
        weight.fill_(float("nan"))
        with pytest.raises(StageError, match="'prompt_embeds' is not finite"):
            make_plan("text_encoding", FAMILY, components, alone()).on_tick(
                [StageRequest("r", make_request(), inputs={})]
            )
    finally:
        weight.copy_(kept)


def test_conditioning_demands_embeddings(denoising: StagePlan) -> None:
    with pytest.raises(DiffusionError, match="no embeddings; call text_encoding first"):
        denoising.on_admission[0]([StageRequest("r", make_request(), inputs={})])


def test_conditioning_demands_negative_embeddings_where_guidance_needs_them(
    denoising: StagePlan, components: Components
) -> None:
    item = encoded(components, StageRequest("r", make_request(), inputs={}))
    guided = StageRequest("r", make_request(guidance_scale=3.0), inputs=item.inputs)
    with pytest.raises(DiffusionError, match=r"guidance_scale=3.0 needs embeddings of the negative prompt"):
        denoising.on_admission[0]([guided])


def test_every_row_has_a_noise_scheduler_of_its_own(denoising: StagePlan, components: Components) -> None:
    rows = prepared(denoising, components, num_outputs=3).rows
    assert len({id(row.noise_scheduler) for row in rows}) == 3
    assert all(len(row.timesteps) == 4 for row in rows)


def test_denoising_refuses_a_step_behind_the_last(denoising: StagePlan, components: Components) -> None:
    rows = prepared(denoising, components, num_inference_steps=1).rows
    denoising.on_tick(rows)
    denoising.on_tick.commit(rows)
    with pytest.raises(StageError, match="has done all its 1 steps"):
        denoising.on_tick(rows)


def test_a_forward_that_is_not_committed_leaves_no_trace(denoising: StagePlan, components: Components) -> None:
    """When another rank failed, the forward pass is run again."""
    once, twice = (prepared(denoising, components, guidance_scale=2.0).rows for _ in range(2))
    denoising.on_tick(twice)
    for rows in (once, twice):
        denoising.on_tick(rows)
        denoising.on_tick.commit(rows)
    assert torch.equal(once[0].latents, twice[0].latents)
    assert twice[0].step == 1


def test_denoising_gives_out_no_latents_that_are_not_finite(denoising: StagePlan, components: Components) -> None:
    item = prepared(denoising, components)
    item.rows[0].latents = torch.full_like(item.rows[0].latents, float("inf"))
    with pytest.raises(StageError, match="'latents' is not finite"):
        denoising.on_tick.collect(item)


def test_a_preview_waits_for_every_row(denoising: StagePlan, components: Components) -> None:
    item = prepared(denoising, components, num_outputs=2, preview_interval=1)
    step_row(denoising, item.rows[0])
    assert denoising.on_tick.preview(item) is None
    step_row(denoising, item.rows[1])
    preview = denoising.on_tick.preview(item)
    assert preview is not None
    assert preview["latents"].shape[0] == 2
    assert denoising.on_tick.preview(item) is None


def step_row(denoising: StagePlan, row: DenoiseRow) -> None:
    denoising.on_tick([row])
    denoising.on_tick.commit([row])


def test_decoding_demands_latents(components: Components) -> None:
    item = StageRequest("r", make_request(), inputs={"prompt_embeds": torch.zeros(1)})
    with pytest.raises(DiffusionError, match=r"'latents' is missing; the state has \['prompt_embeds'\]"):
        make_plan("decoding", FAMILY, components, alone()).on_tick([item])


@pytest.mark.parametrize(
    ("output_format", "names"),
    [("raw", {"pictures"}), ("png", {"media.0", "media.1"}), ("webp", {"media.0", "media.1"})],
)
def test_raw_pictures_leave_the_stage_only_where_they_were_asked_for(
    components: Components, output_format: str, names: set[str]
) -> None:
    request = make_request(output_format=output_format, num_outputs=2)
    item = StageRequest("r", request, inputs={"latents": torch.randn(2, 64, 16)})
    stage = make_plan("decoding", FAMILY, components, alone()).on_tick
    stage([item])
    stage.collect(item)
    assert item.outputs.keys() == names
