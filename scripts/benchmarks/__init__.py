"""The measurements behind scripts/benchmark."""
