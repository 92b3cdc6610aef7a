"""Stable Diffusion XL over several ranks: as Stable Diffusion."""

from triton_diffusion.families.stable_diffusion.parallelize import sequence_plan, tensor_plans

__all__ = ["sequence_plan", "tensor_plans"]
