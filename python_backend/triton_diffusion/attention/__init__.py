"""Attention backends: which there are, how one is chosen, and how a diffusers model is made to use it."""
