"""The request scheduler: admission, batches and replicas of a stage model. Pure Python, the clock handed in."""

from triton_diffusion.scheduler.scheduler import RowId, Scheduler, Tick, Work

__all__ = ["RowId", "Scheduler", "Tick", "Work"]
