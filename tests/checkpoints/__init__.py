"""Tiny but real checkpoints, and two ways to draw with them: our stages and the diffusers pipeline."""
