"""The request scheduler: admission, batches and replicas of a stage model. Pure Python, the clock handed in."""

from triton_diffusion.scheduler.scheduler import Entry, RowId, Scheduler, Tick, Work

__all__ = ["Entry", "RowId", "Scheduler", "Tick", "Work"]
