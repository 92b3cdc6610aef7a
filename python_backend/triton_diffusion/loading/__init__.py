"""From a model path to components on a device."""

from triton_diffusion.loading.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
