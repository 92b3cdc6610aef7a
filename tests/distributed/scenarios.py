"""What the ranks of these tests do: plain functions, since another process has to find them by their names."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, HunyuanVideoTransformer3DModel
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensor

from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.distributed.sequence import Shard
from triton_diffusion.distributed.t5 import t5_tensor_plan
from triton_diffusion.distributed.tiles import SharedTiles, share_tiles
from triton_diffusion.distributed.transformer import prepare_transformer
from triton_diffusion.families.hunyuan_video.parallelize import SEQUENCE_PLAN
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.loading.components import load_components
from triton_diffusion.runtime.stage_loading import load_stage

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.layouts import program
from benchmarks.layouts.messages import Denoised, DenoiseJob, Row

Array = NDArray[np.float32]

LATENT_CHANNELS = 4
TEXT_TOKENS = 24

PLANS = {
    "complete": SEQUENCE_PLAN,
    "without the mask": replace(
        SEQUENCE_PLAN, inputs={"transformer_blocks.0": SEQUENCE_PLAN.inputs["transformer_blocks.0"]}
    ),
    "mask as one stream": replace(
        SEQUENCE_PLAN,
        inputs={
            **SEQUENCE_PLAN.inputs,
            "transformer_blocks.*": {"attention_mask": Shard(-1, ("both",))},
            "single_transformer_blocks.*": {"attention_mask": Shard(-1, ("both",))},
        },
    ),
}


def denoise(
    group: RankGroup, folder: str, size: tuple[int, int], rows: list[Row], num_ticks: int, dtype: str
) -> Denoised:
    """Denoise rows of a FLUX checkpoint that share a batch, by the steps of the benchmark of layouts.

    Its own processes (RankPool) import torch one by one, which takes longer than all the layouts together.
    """
    stage = load_stage("denoising", folder, group, dtype=getattr(torch, dtype), attention_backend="torch_sdpa")
    job = DenoiseJob(
        checkpoint=folder,
        dtype=dtype,
        parallel=group.parallel,
        rank=group.rank,
        store="",
        height=size[0],
        width=size[1],
        rows=rows,
        num_ticks=num_ticks,
    )
    return program._denoise(job, program.Loaded(group, stage.components, stage.executor))


def encode_with_t5(group: RankGroup, folder: str) -> dict[str, Any]:
    """Hidden states of the T5 encoder of a checkpoint, divided as the mesh says."""
    checkpoint = open_checkpoint(folder)
    components = load_components(
        checkpoint,
        ("text_encoder_2",),
        dtype=torch.float32,
        device=group.device,
        tensor_plans={"text_encoder_2": t5_tensor_plan(checkpoint.config("text_encoder_2"))},
        tp=group.mesh.tp,
    )
    encoder = components["text_encoder_2"]
    tokens = torch.randint(3, encoder.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    return {
        "states": encoder(tokens).last_hidden_state.numpy(),
        "num_weights": sum(parameter.numel() for parameter in encoder.parameters()),
        "sent_bytes": group.mesh.tp.traffic.sent_bytes,
    }


def draw_with_hunyuan(group: RankGroup, size: tuple[int, int, int], prompt_lengths: list[int], plan: str) -> Array:
    """One prediction of a small HunyuanVideo transformer, with prompts that are mostly padding."""
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 4),
    ).eval()
    for parameter in model.parameters():
        # Freshly made, the model hardly listens to the prompt.
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1 / parameter.shape[1] ** 0.5)
    batch = len(prompt_lengths)
    mask = torch.arange(TEXT_TOKENS)[None] < torch.tensor(prompt_lengths)[:, None]
    inputs = {
        "hidden_states": torch.randn(batch, LATENT_CHANNELS, *size),
        "timestep": torch.linspace(900, 100, batch).long(),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 16),
        "encoder_attention_mask": mask.long(),
        "pooled_projections": torch.randn(batch, 16),
        "guidance": torch.full((batch,), 6000.0),
    }
    prepare_transformer(model, PLANS[plan], group.mesh, "torch_sdpa")
    output: Array = model(**inputs, return_dict=False)[0].numpy()
    return output


def decode_in_tiles(
    group: RankGroup, shapes: list[tuple[int, int, int]], fails_on: dict[int, int] | None = None
) -> list[Array | str | None]:
    """Decode latents of each shape (B, h, w), one after the other.

    fails_on: number of the shape -> rank whose decoder raises then. Returns for each shape the picture, the error, or
    None on a rank but 0, whose result does not count.
    """
    vae = make_vae()
    share_tiles(vae, group, "on")
    decoder: SharedTiles = vae.decoder
    results: list[Array | str | None] = []
    for index, (batch, height, width) in enumerate(shapes):
        latents = torch.randn(batch, LATENT_CHANNELS, height, width, generator=torch.Generator().manual_seed(index))
        fails = fails_on is not None and fails_on.get(index) == group.rank
        with _failing(decoder.module) if fails else contextlib.nullcontext():
            try:
                picture = decoder.run(lambda latents=latents: vae.decode(latents, return_dict=False)[0])
            except MemoryError as error:
                results.append(str(error))
            else:
                results.append(picture.numpy() if group.is_main else None)
    return results


def make_vae() -> AutoencoderKL:
    """Tiles of 16 x 16 latent pixels, and pictures of twice their size."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


@contextlib.contextmanager
def _failing(module: torch.nn.Module) -> Iterator[None]:
    """Out of memory in earnest only: to find shapes, a module is called with tensors that hold nothing."""

    def fail(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not isinstance(args[0], FakeTensor):
            raise MemoryError("out of memory")

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()
