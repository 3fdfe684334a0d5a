"""The figures of the report as plotly JSON; the page colours text and grid by its light or dark theme."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

BEFORE_COLOUR = "#d9822b"
AFTER_COLOUR = "#1f9d8f"
_SERIES = ("#1f9d8f", "#d9822b", "#6f7bd9", "#c2578a", "#8a8f3c", "#5a9bd5", "#a3673f", "#8c8c8c")
_HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class Figure:
    """A figure ready for the page: `spec` is JSON that is safe inside a script element; `summary` says it in words."""

    id: str
    title: str
    summary: str
    spec: str


def toxicity_histogram(before: np.ndarray, after: np.ndarray) -> Figure:
    """Share of responses by toxicity, both systems over the same bins; `before`, `after`: [N] in [0, 1]."""
    edges = np.linspace(0, 1, _HISTOGRAM_BINS + 1)
    figure = go.Figure()
    for name, scores, colour in (("before", before, BEFORE_COLOUR), ("after", after, AFTER_COLOUR)):
        counts, _ = np.histogram(np.clip(scores, 0, 1), bins=edges)
        figure.add_bar(
            x=((edges[:-1] + edges[1:]) / 2).tolist(),
            y=(100 * counts / max(1, len(scores))).tolist(),
            name=name,
            marker_color=colour,
            hovertemplate="toxicity about %{x:.2f}: %{y:.1f}%",
        )
    figure.update_layout(barmode="group", bargap=0.12)
    figure.update_xaxes(title_text="judge's toxicity of a response", range=[0, 1])
    figure.update_yaxes(title_text="responses, %")
    summary = (
        f"Median toxicity {np.median(before):.3f} before and {np.median(after):.3f} after; "
        f"{np.mean(before >= 0.5):.1%} and {np.mean(after >= 0.5):.1%} of the responses are at 0.5 or above."
    )
    return _finished("toxicity", "Toxicity of the responses", summary, figure)


def training_curves(lines: list[dict[str, Any]]) -> list[Figure]:
    """The curves that the lines of metrics.jsonl have data for, by step; none for a run without training steps."""
    makers: tuple[Callable[[list[dict[str, Any]]], Figure | None], ...] = (
        _reward,
        _kl,
        lambda rows: _single(rows, "response_length", "Response length", "tokens"),
        lambda rows: _single(rows, "entropy", "Entropy of the policy", "nats a token"),
        _logprob_gap,
        _time_split,
    )
    return [figure for make in makers if (figure := make(lines)) is not None]


def _reward(lines: list[dict[str, Any]]) -> Figure | None:
    figure = go.Figure()
    parts = sorted({key for line in lines for key in line if key.startswith(("reward/", "shaping/"))})
    for number, key in enumerate(["reward", *parts]):
        if any(points := _points(lines, key)):
            whole = key == "reward"
            figure.add_scatter(
                x=points[0],
                y=points[1],
                name="reward" if whole else key.removeprefix("reward/"),
                line={
                    "color": _SERIES[number % len(_SERIES)],
                    "width": 2.5 if whole else 1.2,
                    "dash": "solid" if whole else "dot",
                },
            )
    return _curve("reward", "Reward", "reward a response", figure, lines, "reward")


def _kl(lines: list[dict[str, Any]]) -> Figure | None:
    return _single(lines, "kl", "KL to the reference policy", "nats")


def _logprob_gap(lines: list[dict[str, Any]]) -> Figure | None:
    figure = go.Figure()
    for key, name, colour in (("logprob_gap_mean", "mean", _SERIES[0]), ("logprob_gap_max", "maximum", _SERIES[1])):
        x, y = _points(lines, key)
        # A gap of exactly 0 has no place on a logarithmic axis.
        kept = [(step, gap) for step, gap in zip(x, y, strict=True) if gap > 0]
        if kept:
            figure.add_scatter(
                x=[p[0] for p in kept], y=[p[1] for p in kept], name=name, line={"color": colour, "width": 2}
            )
    # A curve within a decade or two needs ticks between the powers of ten.
    gaps = [gap for trace in figure.data for gap in trace.y]
    within_two_decades = bool(gaps) and max(gaps) < 100 * min(gaps)
    figure.update_yaxes(type="log", exponentformat="power", dtick="D2" if within_two_decades else 1)
    return _curve(
        "logprob_gap", "Rollout engine against learner", "|Δ log p|, nats a token", figure, lines, "logprob_gap_mean"
    )


def _time_split(lines: list[dict[str, Any]]) -> Figure | None:
    figure = go.Figure()
    totals = []
    for number, part in enumerate(("rollout", "reward", "learn", "push")):
        x, y = _points(lines, f"time_{part}_s")
        if x:
            figure.add_bar(x=x, y=y, name=part, marker_color=_SERIES[number])
            totals.append(f"{part} {sum(y):.0f} s")
    if not totals:
        return None
    figure.update_layout(barmode="stack", bargap=0.05, legend_traceorder="normal")
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="seconds", rangemode="tozero")
    return _finished("time", "Where the time went", f"In all: {', '.join(totals)}.", figure)


def _single(lines: list[dict[str, Any]], key: str, title: str, unit: str) -> Figure | None:
    x, y = _points(lines, key)
    figure = go.Figure()
    figure.add_scatter(x=x, y=y, name=title, line={"color": AFTER_COLOUR, "width": 2.2})
    figure.update_layout(showlegend=False)
    return _curve(key, title, unit, figure, lines, key)


def _curve(
    identity: str, title: str, unit: str, figure: go.Figure, lines: list[dict[str, Any]], key: str
) -> Figure | None:
    x, y = _points(lines, key)
    if not x or not figure.data:
        return None
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text=unit)
    figure.update_traces(mode="lines" if len(x) > 1 else "markers")
    return _finished(identity, title, f"From {y[0]:.3g} at step {x[0]} to {y[-1]:.3g} at step {x[-1]}.", figure)


def _points(lines: list[dict[str, Any]], key: str) -> tuple[list[Any], list[float]]:
    """Steps and values where the key is there and is a finite number."""
    kept = [
        (line["step"], line[key])
        for line in lines
        if isinstance(line.get(key), int | float)
        and math.isfinite(line[key])
        and isinstance(line.get("step"), int | float)
    ]
    return [step for step, _ in kept], [value for _, value in kept]


def _finished(identity: str, title: str, summary: str, figure: go.Figure) -> Figure:
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        hovermode="x unified",
    )
    figure.update_yaxes(automargin=True)
    # "<" may not stand in a script element as it is: "</script>" would end it.
    spec = json.dumps(figure.to_plotly_json(), allow_nan=False).replace("<", "\\u003c")
    return Figure(identity, title, summary, spec)
