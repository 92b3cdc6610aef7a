"""What a tick really takes in the simulated world. The scheduler does not see this, only its own CostModel."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from simulation.files import check_keys, named_or_file, number
from triton_diffusion.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Measured ticks of one device, one curve for each length of a row (its sequence)."""

    device: str
    max_batch_tokens: int
    curves: dict[int, tuple[tuple[int, float], ...]]
    """By tokens of a row: (tokens in the batch, seconds of the tick), rising. The first one is what the server has."""
    attention_tokens: float | None = None
    """Length of a row at which attention, which grows with the square of it, takes as long as all else, which grows in
    proportion. None: ticks depend on their tokens alone."""

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of the default size."""
        return next(iter(self.curves))

    def tick_s(self, tokens: int, row_tokens: int) -> float:
        """Seconds of a tick of `tokens` in rows of `row_tokens` each: as on the nearest curve, attention corrected."""
        curve = min(self.curves, key=lambda length: max(length, row_tokens) / min(length, row_tokens))
        seconds = _on_curve(self.curves[curve], tokens)
        if self.attention_tokens is not None:
            seconds *= (1 + row_tokens / self.attention_tokens) / (1 + curve / self.attention_tokens)
        return seconds

    def rows_that_fit(self, tokens: int) -> int:
        """Rows of `tokens` each that fit one tick; one always does."""
        return max(1, self.max_batch_tokens // tokens)

    def lone_step_s(self, *, tokens: int, row_tokens: int, num_rows: int) -> float:
        """Seconds of a step of a request that has a replica to itself; `tokens` a row, with guidance of both passes."""
        full, rest = divmod(num_rows, self.rows_that_fit(tokens))
        seconds = full * self.tick_s(tokens * self.rows_that_fit(tokens), row_tokens)
        return seconds + (self.tick_s(tokens * rest, row_tokens) if rest else 0.0)

    def shared_step_s(self, *, tokens: int, row_tokens: int, num_rows: int) -> float:
        """The share of such a request in the seconds of full ticks of its size."""
        rows = self.rows_that_fit(tokens)
        return num_rows * self.tick_s(tokens * rows, row_tokens) / rows


def load_cost_table(given: str, max_batch_tokens: int | None = None) -> CostTable:
    """A built-in table by its name, or one from a file as the server's calibration writes it.

    Raises:
        ConfigurationError: there is no such table, or it does not make sense.
    """
    where, content = named_or_file("cost table", given, "cost_tables.json")
    required = ("device", "max_batch_tokens", "measurements")
    of_the_server = ("threads_by_tokens", "memory_limit", "others_cores")
    optional = ("source", "row_tokens", "other_sizes", "attention_tokens", *of_the_server)
    content = check_keys(where, content, required, optional)
    measurements = _measurements(where, content["measurements"])
    curves = {
        int(number(f"{where}: row_tokens", content.get("row_tokens", measurements[0][0]), whole=True)): measurements
    }
    for index, size in enumerate(content.get("other_sizes", [])):
        part = f"{where}: other_sizes[{index}]"
        size = check_keys(part, size, ("row_tokens", "measurements"))
        curves[int(number(f"{part}.row_tokens", size["row_tokens"], whole=True))] = _measurements(
            part, size["measurements"]
        )
    attention = content.get("attention_tokens")
    limit = content["max_batch_tokens"] if max_batch_tokens is None else max_batch_tokens
    return CostTable(
        device=str(content["device"]),
        max_batch_tokens=int(number(f"{where}: max_batch_tokens", limit, whole=True)),
        curves=curves,
        attention_tokens=None if attention is None else number(f"{where}: attention_tokens", attention),
    )


def _on_curve(curve: tuple[tuple[int, float], ...], tokens: int) -> float:
    """On the line between two measurements, or through the first two; after the last one in proportion to it."""
    last_tokens, last_s = curve[-1]
    if tokens >= last_tokens or len(curve) == 1:
        return last_s * tokens / last_tokens
    index = max(1, bisect_left(curve, (tokens, 0.0)))
    (low_tokens, low_s), (high_tokens, high_s) = curve[index - 1], curve[index]
    seconds = low_s + (high_s - low_s) * (tokens - low_tokens) / (high_tokens - low_tokens)
    return max(seconds, low_s * tokens / low_tokens) if tokens < low_tokens else seconds


def _measurements(where: str, given: Any) -> tuple[tuple[int, float], ...]:
    pairs = isinstance(given, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in given)
    if not pairs or not given:
        raise ConfigurationError(
            f"{where}: measurements={given!r} must be [[tokens, seconds], ...]; give at least one pair"
        )
    read = [
        (int(number(f"{where}: tokens", tokens, whole=True)), number(f"{where}: seconds", seconds))
        for tokens, seconds in given
    ]
    return tuple(sorted(read))
