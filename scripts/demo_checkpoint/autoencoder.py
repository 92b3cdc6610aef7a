"""The demo checkpoint's autoencoder: 128x128 pictures to 16x16 latents of 16 channels, and back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from demo_checkpoint import scenes
from demo_checkpoint.training import AveragedWeights, LearningRate, Muon, SavedProgress, step_generator

SCALING_FACTOR = 0.3611
"""FLUX.1's own: the latents are brought to the deviation 1 / SCALING_FACTOR, so that who forgets it sees it."""
SHIFT_FACTOR = 0.1159
"""FLUX.1's own: the latents are brought to this mean."""

_KL_WEIGHT = 1e-6
_OBJECT_WEIGHT = 4.0
_SAVE_EVERY = 250
_NORMALISATION_PICTURES = 1024


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """How the autoencoder is trained."""

    steps: int
    """Optimizer steps."""
    seed: int
    """Fixes the weights at the start, the pictures and their order."""
    batch_size: int = 8
    """Pictures a step."""
    peak_learning_rate: float = 2.5e-3
    """The highest learning rate of both optimizers."""
    pictures: int = 8192
    """Pictures drawn once, and met in random order."""


def build_autoencoder() -> AutoencoderKL:
    """Build the untrained autoencoder, of 1.0 M parameters.

    The 1x1 quant convolutions, which FLUX.1 has not, take up the latents' normalisation (`normalise_latents`).
    """
    model = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=scenes.PICTURE_SIZE,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        force_upcast=False,
    )
    with torch.no_grad():  # start with little noise on the latents, or the decoder begins by ignoring them
        model.quant_conv.weight[model.config.latent_channels :] *= 0.1
        model.quant_conv.bias[model.config.latent_channels :] = -4.0
    return model


def draw_pictures(drawn: list[scenes.Scene], seed: int) -> torch.Tensor:
    """Draw scenes as one uint8 tensor (N, 3, 128, 128)."""
    rng = random.Random(f"pictures {seed}")
    size = scenes.PICTURE_SIZE
    pictures = np.empty((len(drawn), 3, size, size), np.uint8)
    for picture, scene in zip(pictures, drawn, strict=True):
        picture[:] = np.asarray(scenes.draw(scene, rng)).transpose(2, 0, 1)
    return torch.from_numpy(pictures)


def to_model_range(pictures: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pictures into floats from -1 to 1."""
    return pictures.float() / 127.5 - 1


def make_optimizers(model: AutoencoderKL, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions and matrices, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_outer = name.startswith(("encoder.conv_in", "decoder.conv_out", "quant_conv", "post_quant_conv"))
        (rest if is_outer or parameter.ndim < 2 else matrices).append(parameter)
    return [
        Muon(matrices, lr=learning_rate),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.97), weight_decay=0.01),
    ]


def train_autoencoder(settings: AutoencoderSettings, work_dir: Path) -> AutoencoderKL:
    """Train the autoencoder, go on from the state in `work_dir`, or read the finished one there.

    Returns it with averaged weights and normalised latents.
    """
    torch.manual_seed(settings.seed)
    model = build_autoencoder()
    finished = work_dir / f"autoencoder_after_{settings.steps}_steps_seed_{settings.seed}.pt"
    if finished.exists():
        model.load_state_dict(torch.load(finished, weights_only=True))
        return model.eval()
    optimizers = make_optimizers(model, settings.peak_learning_rate)
    averaged = AveragedWeights(model, decay=0.998)
    progress = SavedProgress(work_dir / "autoencoder.pt", model, averaged, optimizers)
    done = progress.load(vars(settings))
    pictures = draw_pictures(scenes.random_scenes(settings.pictures, settings.seed, held_out=False), settings.seed)
    for step in _steps(model, optimizers, pictures, settings, done):
        averaged.update(step)
        if (step + 1) % _SAVE_EVERY == 0:
            progress.save(step + 1, vars(settings))
    averaged.copy_to_model()
    normalise_latents(model, pictures[:_NORMALISATION_PICTURES])
    torch.save(model.state_dict(), finished)
    return model.eval()


def _steps(
    model: AutoencoderKL,
    optimizers: list[torch.optim.Optimizer],
    pictures: torch.Tensor,
    settings: AutoencoderSettings,
    done: int,
) -> Iterator[int]:
    """Take the steps that are left, and yield each one's number after it is done."""
    learning_rate = LearningRate(peak=settings.peak_learning_rate, warmup_steps=100, total_steps=settings.steps)
    model.train()
    bar = tqdm(range(done, settings.steps), initial=done, total=settings.steps, desc="autoencoder", mininterval=5)
    for step in bar:
        generator = step_generator(settings.seed, step)
        chosen = torch.randint(len(pictures), (settings.batch_size,), generator=generator)
        batch = to_model_range(pictures[chosen])
        loss, error = _loss(model, batch, generator)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate.at(step)
            optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", mean_error=f"{error.item():.4f}", refresh=False)
        yield step


def _loss(model: AutoencoderKL, batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of pictures (B, 3, H, W) and their mean absolute error.

    Most of a picture is background; pixels that differ from its corner count more.
    """
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(batch).latent_dist
        restored = model.decode(posterior.sample(generator)).sample.float()
    difference = restored - batch
    is_object = (batch - batch[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.02
    weight = 1 + _OBJECT_WEIGHT * is_object
    weight = weight / weight.mean()
    error = difference.abs()
    loss = (weight * (error + difference.square())).mean() + _KL_WEIGHT * posterior.kl().float().mean()
    return loss, error.mean()


@torch.no_grad()
def encode_pictures(model: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    """Return the latents' means (N, 16, 16, 16), not scaled, of uint8 pictures (N, 3, 128, 128)."""
    latents = []
    for batch in tqdm(pictures.split(batch_size), desc="latents", mininterval=5):
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(model.encode(to_model_range(batch)).latent_dist.mean.float())
    return torch.cat(latents)


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Change the quant convolutions so that every latent channel has FLUX.1's mean and deviation.

    `post_quant_conv` undoes what `quant_conv` does, so that pictures stay as they were.
    """
    latents = encode_pictures(model, pictures)
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    gain = 1 / (SCALING_FACTOR * deviation)
    offset = SHIFT_FACTOR - mean * gain
    channels = len(gain)
    quant, post_quant = model.quant_conv, model.post_quant_conv
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = quant.bias[:channels] * gain + offset
    quant.bias[channels:] += 2 * gain.log()  # the second half is the logarithm of the variance
    post_quant.bias -= (post_quant.weight[:, :, 0, 0] * (offset / gain)).sum(dim=1)
    post_quant.weight /= gain[None, :, None, None]
