"""Stable Diffusion 3 and 3.5 (Stability AI): flow matching, with two CLIPs and T5, which may be absent."""

from triton_diffusion.families.stable_diffusion_3.family import FAMILY

__all__ = ["FAMILY"]
