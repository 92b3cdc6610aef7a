"""The demo checkpoint's transformer: a FLUX of 5.2 M parameters, trained by flow matching with its text encoders."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from tqdm import tqdm

from demo_checkpoint import scenes, text
from demo_checkpoint.autoencoder import draw_pictures, encode_pictures
from demo_checkpoint.training import AveragedWeights, LearningRate, Muon, SavedProgress, step_generator

_SIDE = scenes.PICTURE_SIZE // 16
"""Image tokens along each side of a picture."""
_SIGMA_SHIFT = math.exp(0.4675)
"""How FluxPipeline shifts the noise levels of a picture of 64 tokens; those of the training are shifted alike."""
_CAPTION_DROPOUT = 0.1
_PART_SIZE = 16
"""Pictures that a thread works on at a time; all parts are of this size."""
_SAVE_EVERY = 250


@dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """How the transformer and the text encoders are trained."""

    steps: int
    """Optimizer steps."""
    seed: int
    """Fixes the weights at the start, the pictures, captions and noise."""
    batch_size: int = 32
    """Pictures a step."""
    pictures: int = 24_000
    """Pictures drawn and encoded once, and met in random order, each time in other words."""
    peak_learning_rate: float = 2.5e-3
    """Muon's highest learning rate, for the matrices of the blocks."""
    peak_learning_rate_rest: float = 1e-3
    """AdamW's highest learning rate, for all other weights."""


class TextToLatents(nn.Module):
    """All that is trained together: the transformer and both text encoders."""

    def __init__(self, tokenizers: text.Tokenizers) -> None:
        super().__init__()
        self.text_encoder = text.build_clip_text_encoder(tokenizers.clip)
        self.text_encoder_2 = text.build_t5_encoder(tokenizers.t5)
        self.transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=3,
            joint_attention_dim=text.WIDTH,
            pooled_projection_dim=text.WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(16, 24, 24),
        )
        image_ids = torch.zeros(_SIDE, _SIDE, 3)
        image_ids[..., 1] = torch.arange(_SIDE)[:, None]
        image_ids[..., 2] = torch.arange(_SIDE)[None, :]
        self.register_buffer("image_ids", image_ids.reshape(-1, 3), persistent=False)
        self.register_buffer("text_ids", torch.zeros(text.MAX_TOKENS, 3), persistent=False)

    def forward(
        self, latents: torch.Tensor, sigmas: torch.Tensor, clip_ids: torch.Tensor, t5_ids: torch.Tensor
    ) -> torch.Tensor:
        """Predict noise minus picture.

        latents: (B, 64, 64) packed and noisy; sigmas: (B,), 0 to 1; clip_ids, t5_ids: (B, MAX_TOKENS).
        """
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=self.text_encoder_2(t5_ids).last_hidden_state,
            pooled_projections=self.text_encoder(clip_ids).pooler_output,
            timestep=sigmas,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


@dataclass(frozen=True, kw_only=True)
class TrainingExamples:
    """Scenes and what the autoencoder makes of their pictures, in the same order."""

    scenes: list[scenes.Scene]
    """What each picture shows."""
    latents: torch.Tensor
    """(N, 64, 64): 64 tokens of 64 channels each, scaled as the transformer sees them."""


def make_examples(autoencoder: AutoencoderKL, settings: TransformerSettings, work_dir: Path) -> TrainingExamples:
    """Draw and encode the training pictures, or read the latents that an earlier run left in `work_dir`."""
    weights = autoencoder.quant_conv.weight.detach().numpy().tobytes()
    made_from = hashlib.sha256(weights + f"{settings.seed} {settings.pictures}".encode()).hexdigest()[:12]
    path = work_dir / f"latents_{made_from}.pt"
    drawn = scenes.random_scenes(settings.pictures, settings.seed + 1, held_out=False)
    if path.exists():
        return TrainingExamples(scenes=drawn, latents=torch.load(path, weights_only=True))
    means = encode_pictures(autoencoder, draw_pictures(drawn, settings.seed + 1))
    config = autoencoder.config
    scaled = (means - config.shift_factor) * config.scaling_factor
    latents = FluxPipeline._pack_latents(scaled, len(scaled), scaled.shape[1], *scaled.shape[2:]).contiguous()
    torch.save(latents, path)
    return TrainingExamples(scenes=drawn, latents=latents)


def make_optimizers(model: TextToLatents, settings: TransformerSettings) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, modulations, norms, biases and the text encoders."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        in_a_block = "transformer_blocks." in name and ".linear." not in name
        (matrices if in_a_block and parameter.ndim == 2 else rest).append(parameter)
    return [
        Muon(matrices, lr=settings.peak_learning_rate),
        torch.optim.AdamW(rest, lr=settings.peak_learning_rate_rest, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_transformer(
    autoencoder: AutoencoderKL,
    tokenizers: text.Tokenizers,
    settings: TransformerSettings,
    work_dir: Path,
    *,
    snapshot: bool = False,
) -> TextToLatents:
    """Train, or go on from the state in `work_dir`; return the model with averaged weights.

    With `snapshot`, return what the state holds and train nothing.
    """
    torch.manual_seed(settings.seed)
    model = TextToLatents(tokenizers)
    optimizers = make_optimizers(model, settings)
    averaged = AveragedWeights(model, decay=0.999)
    progress = SavedProgress(work_dir / "transformer.pt", model, averaged, optimizers)
    done = progress.load(vars(settings))
    if done < settings.steps and not snapshot:
        examples = make_examples(autoencoder, settings, work_dir)
        for step in _steps(model, tokenizers, optimizers, examples, settings, done):
            averaged.update(step)
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == settings.steps:
                progress.save(step + 1, vars(settings))
    averaged.copy_to_model()
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A part of a step's batch: what one thread works on at a time."""

    clean: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor


def _steps(
    model: TextToLatents,
    tokenizers: text.Tokenizers,
    optimizers: list[torch.optim.Optimizer],
    examples: TrainingExamples,
    settings: TransformerSettings,
    done: int,
) -> Iterator[int]:
    """Take the steps that are left, and yield each one's number after it is done.

    Every thread takes parts of the batch and works on them alone: faster than all threads on every operation, most of
    all where other programs use the processor too.
    """
    peaks = (settings.peak_learning_rate, settings.peak_learning_rate_rest)
    rates = [LearningRate(peak=peak, warmup_steps=200, total_steps=settings.steps) for peak in peaks]
    model.train()
    parameters = list(model.parameters())
    smooth_loss = None
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    bar = tqdm(range(done, settings.steps), initial=done, total=settings.steps, desc="transformer", mininterval=5)
    with ThreadPoolExecutor(num_threads) as pool:
        for step in bar:
            parts = _draw_batch(tokenizers, examples, settings, step)
            results = list(pool.map(partial(_loss_and_gradients, model, parameters), parts))
            loss = sum(part_loss for part_loss, _ in results) / len(parts)
            for parameter, *gradients in zip(parameters, *(gradients for _, gradients in results), strict=True):
                parameter.grad = torch.stack(gradients).mean(dim=0)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate.at(step)
            list(pool.map(lambda optimizer: optimizer.step(), optimizers))
            smooth_loss = loss if smooth_loss is None else 0.98 * smooth_loss + 0.02 * loss
            bar.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
            yield step
    torch.set_num_threads(num_threads)


def _draw_batch(
    tokenizers: text.Tokenizers, examples: TrainingExamples, settings: TransformerSettings, step: int
) -> list[_Part]:
    """Choose one step's pictures, their words, noise and noise levels (logit-normal, Esser et al., 2024)."""
    generator = step_generator(settings.seed, step)
    rng = random.Random(f"step {settings.seed} {step}")
    chosen = torch.randint(len(examples.latents), (settings.batch_size,), generator=generator)
    prompts = [
        "" if rng.random() < _CAPTION_DROPOUT else scenes.caption(examples.scenes[i], rng) for i in chosen.tolist()
    ]
    clean = examples.latents[chosen]
    noise = torch.randn(clean.shape, generator=generator)
    sigmas = torch.sigmoid(torch.randn(len(clean), generator=generator))
    sigmas = _SIGMA_SHIFT * sigmas / (1 + (_SIGMA_SHIFT - 1) * sigmas)
    sigmas = sigmas.bfloat16().float()  # autocast rounds the timestep: the noise must agree with it
    tensors = (clean, noise, sigmas, *tokenizers(prompts))
    split = zip(*(tensor.split(_PART_SIZE) for tensor in tensors), strict=True)
    return [
        _Part(clean=clean, noise=noise, sigmas=sigmas, clip_ids=clip_ids, t5_ids=t5_ids)
        for clean, noise, sigmas, clip_ids, t5_ids in split
    ]


def _loss_and_gradients(
    model: TextToLatents, parameters: list[nn.Parameter], part: _Part
) -> tuple[float, tuple[torch.Tensor, ...]]:
    """Return the flow-matching loss (Lipman et al., 2022) of a part of a batch, and its gradient by parameter."""
    noisy = torch.lerp(part.clean, part.noise, part.sigmas[:, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(noisy, part.sigmas, part.clip_ids, part.t5_ids)
    loss = nn.functional.mse_loss(predicted.float(), part.noise - part.clean)
    return loss.item(), torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def make_noise_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make the noise scheduler with the settings of FLUX.1-dev."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15)
