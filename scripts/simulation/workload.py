"""Who asks for what, and when: drawn from a seed in chunks, the same for every policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simulation.cost_table import CostTable
from simulation.files import check_keys, named_or_file, number
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.scheduler import DEFAULT_PRIORITY, DeadlineAction

Arrivals = Literal["poisson", "bursty"]

_CHUNK = 65_536


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Requests of one size."""

    name: str
    group: str
    """Reported together ("class" in the file)."""
    share: float
    """Of all requests; the shares of a mix are scaled to 1."""
    tokens: int
    """Sequence length of a row."""
    fewest_steps: int
    most_steps: int
    """The number of steps is drawn evenly from here."""
    num_rows: int = 1

    @property
    def mean_steps(self) -> float:
        """In the long run."""
        return (self.fewest_steps + self.most_steps) / 2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A stream of requests."""

    kinds: tuple[Kind, ...]
    rate_per_s: float
    num_requests: int
    seed: int = 0
    arrivals: Arrivals = "poisson"
    """"bursty": bursts with silence between them (a Markov-modulated Poisson process), of the same rate in the mean."""
    burst_factor: float = 4.0
    """How many times the mean rate a burst has."""
    burst_s: float = 60.0
    """Mean length of a burst."""
    guided_share: float = 0.0
    """Of the requests that have twice the tokens."""
    priorities: tuple[int, ...] = (DEFAULT_PRIORITY,)
    """Drawn evenly from these."""
    deadline_factor: float | None = None
    """The deadline of a request as a multiple of its lone latency; None for none."""
    deadline_action: DeadlineAction = "refuse"
    cancel_share: float = 0.0
    """Of the requests whose caller goes away, at a moment within `cancel_within` lone latencies; some are through by
    then."""
    cancel_within: float = 3.0

    def chunks(self, table: CostTable) -> Iterator[Chunk]:
        """All requests in the order of their arrival."""
        generator = np.random.default_rng(self.seed)
        moments = _Moments(self, generator)
        kinds = self.kinds
        shares = np.array([kind.share for kind in kinds])
        fewest = np.array([kind.fewest_steps for kind in kinds])
        most = np.array([kind.most_steps for kind in kinds])
        step_s = np.array([lone_step_s(table, kind, guided=guided) for kind in kinds for guided in (False, True)])
        for start in range(0, self.num_requests, _CHUNK):
            size = min(_CHUNK, self.num_requests - start)
            at_s = moments.next(size)
            kind = generator.choice(len(kinds), size, p=shares / shares.sum())
            steps = generator.integers(fewest[kind], most[kind], endpoint=True)
            guided = generator.random(size) < self.guided_share
            lone_s = steps * step_s[2 * kind + guided]
            cancels = generator.random(size) < self.cancel_share
            yield Chunk(
                at_s=at_s,
                kind=kind,
                steps=steps,
                guided=guided,
                priority=np.array(self.priorities)[generator.integers(0, len(self.priorities), size)],
                lone_s=lone_s,
                cancel_s=np.where(cancels, at_s + generator.random(size) * self.cancel_within * lone_s, np.inf),
            )


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some of the requests, one column a property; `kind` is an index into those of the workload."""

    at_s: NDArray[np.float64]
    kind: NDArray[np.int64]
    steps: NDArray[np.int64]
    guided: NDArray[np.bool_]
    priority: NDArray[np.int64]
    lone_s: NDArray[np.float64]
    """Latency if the request had a replica to itself, without noise."""
    cancel_s: NDArray[np.float64]
    """When the caller goes away; infinite for most."""


class _Moments:
    """Moments of arrival. Bursts are a Poisson process of a higher rate, into which silences are inserted."""

    def __init__(self, workload: Workload, generator: np.random.Generator) -> None:
        self._generator = generator
        self._bursty = workload.arrivals == "bursty"
        self._gap_s = 1 / workload.rate_per_s / (workload.burst_factor if self._bursty else 1.0)
        self._burst_s = workload.burst_s
        self._silence_s = workload.burst_s * (workload.burst_factor - 1)
        self._active_s = 0.0
        self._burst_ends_s = generator.exponential(self._burst_s) if self._bursty else np.inf
        self._silent_s = 0.0

    def next(self, size: int) -> NDArray[np.float64]:
        active_s = self._active_s + np.cumsum(self._generator.exponential(self._gap_s, size))
        self._active_s = float(active_s[-1])
        if not self._bursty:
            return np.asarray(active_s)
        # (end of a burst in time without silences, silence up to there)
        ends, silences = [self._burst_ends_s], [self._silent_s]
        while ends[-1] < self._active_s:
            ends.append(ends[-1] + self._generator.exponential(self._burst_s))
            silences.append(silences[-1] + self._generator.exponential(self._silence_s))
        self._burst_ends_s, self._silent_s = ends[-1], silences[-1]
        moments: NDArray[np.float64] = active_s + np.array(silences)[np.searchsorted(ends, active_s)]
        return moments


def tokens_of(kind: Kind, *, guided: bool) -> int:
    """Tokens of a row as the scheduler counts them: with guidance those of both predictions."""
    return kind.tokens * (2 if guided else 1)


def lone_step_s(table: CostTable, kind: Kind, *, guided: bool) -> float:
    """Seconds of a step of such a request that has a replica to itself."""
    return table.lone_step_s(tokens=tokens_of(kind, guided=guided), row_tokens=kind.tokens, num_rows=kind.num_rows)


def capacity_per_s(
    kinds: tuple[Kind, ...], table: CostTable, *, guided_share: float = 0.0, batched: bool = True
) -> float:
    """Requests a second that one replica can do at most: in full batches, or one request after the other."""
    total_s = 0.0
    for kind in kinds:
        for guided, share in ((False, 1 - guided_share), (True, guided_share)):
            step_s = table.shared_step_s if batched else table.lone_step_s
            seconds = step_s(tokens=tokens_of(kind, guided=guided), row_tokens=kind.tokens, num_rows=kind.num_rows)
            total_s += share * kind.share * kind.mean_steps * seconds
    return sum(kind.share for kind in kinds) / total_s


def load_mix(given: str, table: CostTable) -> tuple[Kind, ...]:
    """A built-in mix by its name, or one from a file: a JSON list with an object for each kind of request.

    {"name": "512x512", "class": "short", "share": 0.5, "steps": 4, "tokens": 1536}; "steps": [4, 50] draws between;
    "relative_tokens": 0.5 in place of "tokens" is half a row of the cost table's default size; "rows": 2 asks for two
    pictures.

    Raises:
        ConfigurationError: there is no such mix, or it does not make sense.
    """
    where, content = named_or_file("mix", given, "mixes.json")
    if not isinstance(content, list) or not content:
        raise ConfigurationError(
            f"{where}: must be a JSON list with an object for each kind; see scripts/simulation/mixes.json"
        )
    kinds = tuple(_kind(f"{where}: [{index}]", each, table) for index, each in enumerate(content))
    names = [kind.name for kind in kinds]
    if len({*names}) < len(names):
        raise ConfigurationError(f"{where}: the names {', '.join(names)} must differ; rename one")
    return kinds


def _kind(where: str, given: Any, table: CostTable) -> Kind:
    given = check_keys(where, given, ("name", "class", "share", "steps"), ("tokens", "relative_tokens", "rows"))
    if ("tokens" in given) == ("relative_tokens" in given):
        raise ConfigurationError(f"{where}: one of 'tokens' and 'relative_tokens' is needed; give either")
    if "tokens" in given:
        tokens = int(number(f"{where}.tokens", given["tokens"], whole=True))
    else:
        relative = number(f"{where}.relative_tokens", given["relative_tokens"])
        tokens = max(1, round(relative * table.row_tokens))
    steps = given["steps"] if isinstance(given["steps"], list) else [given["steps"]] * 2
    if len(steps) != 2:
        raise ConfigurationError(f"{where}.steps={steps} must be a number or [fewest, most]; give two")
    fewest, most = (int(number(f"{where}.steps", each, whole=True)) for each in steps)
    if fewest > most:
        raise ConfigurationError(f"{where}.steps={steps} must be [fewest, most]; exchange them")
    return Kind(
        name=str(given["name"]),
        group=str(given["class"]),
        share=number(f"{where}.share", given["share"]),
        tokens=tokens,
        fewest_steps=fewest,
        most_steps=most,
        num_rows=int(number(f"{where}.rows", given.get("rows", 1), whole=True)),
    )
