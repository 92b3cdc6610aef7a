"""Ranks and how they talk to each other."""
