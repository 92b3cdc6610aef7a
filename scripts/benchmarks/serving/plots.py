"""The pictures of the figures: pictures a second by clients, and latency by load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.serving.closed_loop import ClosedLoopResult
from benchmarks.serving.open_loop import OpenLoopResult
from benchmarks.serving.summary import percentile

_TITLES = {
    "ours": "triton-diffusion",
    "monolith": "Triton, one Python model",
    "fastapi": "FastAPI, a lock",
    "litserve": "LitServe, batching",
    "limit": "FluxPipeline in process",
}
_COLOURS = {
    "ours": "#1b6ca8",
    "monolith": "#d1495b",
    "fastapi": "#edae49",
    "litserve": "#66a182",
    "limit": "#9aa0a6",
}
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def draw_throughput(result: ClosedLoopResult, file: Path) -> None:
    """Bars by number of clients; the lines on them reach from the lowest to the highest round."""
    names = [name for name in _TITLES if any(name in rates for rates in result.rates.values())]
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(7.5, 3.8), layout="constrained")
        axes = canvas.add_subplot()
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            rates = {x: by_name[name] for x, by_name in enumerate(result.rates.values()) if name in by_name}
            medians = [statistics.median(by_round) for by_round in rates.values()]
            axes.bar(
                [x + (index - (len(names) - 1) / 2) * width for x in rates],
                medians,
                width * 0.92,
                yerr=_distances(list(rates.values()), medians),
                error_kw={"elinewidth": 1, "ecolor": "#404040"},
                color=_COLOURS[name],
                label=_TITLES[name],
            )
        axes.set_xticks(range(len(result.rates)), [str(clients) for clients in result.rates])
        axes.set_xlabel("clients that each wait for their picture")
        axes.set_ylabel("pictures per second")
        axes.tick_params(axis="x", length=0)
        axes.legend(loc="upper left")
        _save(canvas, file)


def _distances(by_x: Sequence[Sequence[float]], medians: Sequence[float]) -> list[list[float]]:
    pairs = list(zip(by_x, medians, strict=True))
    return [[median - min(rates) for rates, median in pairs], [max(rates) - median for rates, median in pairs]]


def draw_latency(results: Sequence[OpenLoopResult], reference: str, file: Path) -> None:
    """Two panels, median and 99th percentile, a line a side."""
    results = sorted(results, key=lambda result: result.load)
    loads = [100 * result.load for result in results]
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(9.0, 3.8), layout="constrained")
        panels = canvas.subplots(1, 2, sharex=True, sharey=True)
        for axes, percent, title in zip(panels, (50, 99), ("median", "99th percentile"), strict=True):
            for name in (name for name in _TITLES if name in results[0].sent):
                latencies_s = [percentile(result.latencies_s(name), percent) for result in results]
                axes.plot(loads, latencies_s, marker="o", markersize=4, color=_COLOURS[name], label=_TITLES[name])
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel(f"arrivals, % of what {_TITLES[reference]!r} can take")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        panels[0].set_ylabel("latency, seconds")
        panels[0].legend(loc="upper left")
        _save(canvas, file)


def _plain_number(value: float, _position: Any) -> str:
    return f"{value:g}"


def _save(canvas: Canvas, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(file, dpi=150)
