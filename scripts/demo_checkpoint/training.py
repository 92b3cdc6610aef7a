"""What both trainings share: stopping and resuming, the learning rate's course, and averaged weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A short warm-up, a long stretch at the peak, and a straight way down over the last part."""

    peak: float
    """The highest learning rate."""
    warmup_steps: int
    """Steps until it is reached."""
    total_steps: int
    """Steps of the whole training."""
    decay_share: float = 0.4
    """Which part of all steps the way down takes."""

    def at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising = (step + 1) / self.warmup_steps
        falling = (self.total_steps - step) / (self.decay_share * self.total_steps)
        return self.peak * min(1.0, rising, falling)


class AveragedWeights:
    """The running mean of a model's weights: the one that is kept, since it draws better than the last step's."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = list(model.parameters())
        self.means = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`; the mean is shorter at first, so that the start is forgotten."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.means, self._parameters, 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Put the averaged weights into the model; its own are lost."""
        torch._foreach_copy_(self._parameters, self.means)


class SavedProgress:
    """A training's state in one file, so that a stopped run goes on where it was."""

    def __init__(
        self, path: Path, model: nn.Module, averaged: AveragedWeights, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self._path = path
        self._model = model
        self._averaged = averaged
        self._optimizers = optimizers

    def load(self, settings: dict[str, Any]) -> int:
        """Return the number of steps done; 0 and nothing loaded where there is no state.

        Raises ValueError when the state was made with other settings.
        """
        if not self._path.exists():
            return 0
        state = torch.load(self._path, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{self._path} was trained with {state['settings']}, this run asks for {settings}; "
                "give the same settings, another --work-dir, or delete that file"
            )
        self._model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        for mean, saved in zip(self._averaged.means, state["averaged"], strict=True):
            mean.copy_(saved)
        return int(state["steps"])

    def save(self, steps: int, settings: dict[str, Any]) -> None:
        """Write the state after `steps` steps; a stop while writing leaves the older file."""
        partial = self._path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "steps": steps,
            "settings": settings,
            "model": self._model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "averaged": self._averaged.means,
        }
        torch.save(state, partial)
        partial.replace(self._path)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the random numbers of one step, the same whether or not the training was stopped before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, one matrix at a time; on these models it learns twice as fast as AdamW.

    After Keller Jordan, https://kellerjordan.github.io/posts/muon, scaled to AdamW's size of step as in Liu et al.,
    "Muon is Scalable for LLM Training", section 2.2. Unlike torch.optim.Muon it takes convolutions too, as matrices
    of (out, in * height * width).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = _orthogonal(torch.lerp(parameter.grad, momentum, group["momentum"]).flatten(1))
                step_size = 0.2 * max(update.shape) ** 0.5 * group["lr"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.view_as(parameter), alpha=step_size)


def _orthogonal(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Bring all singular values of a matrix near 1, by Newton-Schulz iterations."""
    x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
    is_tall = len(x) > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * (square @ square)) @ x
    return (x.T if is_tall else x).float()
