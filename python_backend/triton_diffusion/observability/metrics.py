"""What a stage model counts. Plain numbers, added up where the work is done, published from there once a second.

Triton's own queue and compute metrics say nothing about our models, whose instances answer later: these stand in for
them. Sums and counts are enough for averages over any time, such as rate(tick_seconds) / rate(ticks).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StageMetrics:
    """Gauges and running totals of one stage model; each is published as diffusion_<name>{model="..."}."""

    queue_depth: int = field(default=0, metadata={"gauge": "Requests that have not been put in a batch yet"})
    queue_cost: int = field(default=0, metadata={"gauge": "Tokens x steps left of all requests that wait or run"})
    max_batch_tokens: int = field(default=0, metadata={"gauge": "Tokens that a batch may have"})
    running_requests: int = field(default=0, metadata={"gauge": "Requests that have been put in a batch"})
    ready_replicas: int = field(default=0, metadata={"gauge": "Worker groups that take work"})
    ticks_total: int = field(default=0, metadata={"counter": "Batches run; in denoising one is one step"})
    batch_rows_total: int = field(default=0, metadata={"counter": "Rows in these batches"})
    batch_tokens_total: int = field(default=0, metadata={"counter": "Tokens in these batches"})
    tick_seconds_total: float = field(
        default=0.0, metadata={"counter": "Seconds that the ranks spent in these batches"}
    )
    queue_seconds_total: float = field(default=0.0, metadata={"counter": "Seconds that ended requests had waited"})
    stage_seconds_total: float = field(default=0.0, metadata={"counter": "Seconds that ended requests had run"})
    requests_done_total: int = field(default=0, metadata={"counter": "Requests answered with a result"})
    requests_failed_total: int = field(default=0, metadata={"counter": "Requests answered with an error"})
    requests_cancelled_total: int = field(default=0, metadata={"counter": "Requests cancelled by their caller"})
    requests_refused_total: int = field(default=0, metadata={"counter": "Requests refused because the queue was full"})
    deadlines_exceeded_total: int = field(
        default=0, metadata={"counter": "Requests refused or dropped because their deadline could not be met"}
    )
    prompt_cache_lookups_total: int = field(default=0, metadata={"counter": "Prompts looked up in the prompt cache"})
    prompt_cache_hits_total: int = field(default=0, metadata={"counter": "Prompts found in the prompt cache"})
    restarts_total: int = field(default=0, metadata={"counter": "Worker groups that died and were replaced"})
    watchdog_kills_total: int = field(default=0, metadata={"counter": "Those of them that were stuck and were killed"})
    replays_total: int = field(
        default=0, metadata={"counter": "Times that a request went on from a checkpoint, or anew, after such a death"}
    )
    moves_total: int = field(default=0, metadata={"counter": "Times that a waiting request went to another replica"})
    requests_given_up_total: int = field(
        default=0, metadata={"counter": "Requests given up because their worker groups died of them"}
    )
    checkpoint_bytes: int = field(default=0, metadata={"gauge": "Bytes of the checkpoints that are held"})
