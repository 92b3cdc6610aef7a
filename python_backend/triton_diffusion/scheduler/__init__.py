"""The request scheduler: admission, batches and replicas of a stage model. Pure Python, the clock handed in."""

from triton_diffusion.scheduler.cost import CostModel
from triton_diffusion.scheduler.scheduler import SEND_AHEAD_BELOW_S, Scheduler
from triton_diffusion.scheduler.work import (
    DEFAULT_PRIORITY,
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    DeadlineAction,
    Entry,
    RowId,
    Tick,
    Work,
)

__all__ = [
    "DEFAULT_PRIORITY",
    "HIGHEST_PRIORITY",
    "LOWEST_PRIORITY",
    "SEND_AHEAD_BELOW_S",
    "CostModel",
    "DeadlineAction",
    "Entry",
    "RowId",
    "Scheduler",
    "Tick",
    "Work",
]
