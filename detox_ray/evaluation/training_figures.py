"""The curves of a training: of metrics.jsonl, a line per step, and of evaluations.jsonl, a line per evaluation."""

import math
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go

from detox_ray.evaluation.figures import SYSTEM_COLOURS, Figure, page_figure
from detox_ray.evaluation.reward_hacking import RewardJudgeGap

_REWARD_COLOUR, _JUDGE_COLOUR = SYSTEM_COLOURS[2], SYSTEM_COLOURS[1]
_SERIES = (SYSTEM_COLOURS[1], SYSTEM_COLOURS[0], *SYSTEM_COLOURS[2:])
Lines = list[dict[str, Any]]


def training_curves(lines: Lines) -> list[Figure]:
    """The curves that the lines of metrics.jsonl have data for, by step; none for a run without training steps."""
    makers: tuple[Callable[[Lines], Figure | None], ...] = (
        _reward,
        lambda rows: _single(rows, "loss", "Loss", "nats per response token"),
        lambda rows: _single(rows, "dev_loss", "Loss on the dev examples", "nats per response token"),
        lambda rows: _single(rows, "kl", "KL to the reference policy", "nats"),
        lambda rows: _single(rows, "response_length", "Response length", "tokens"),
        lambda rows: _single(rows, "entropy", "Entropy of the policy", "nats per token"),
        _logprob_gap,
        _time_split,
    )
    return [figure for make in makers if (figure := make(lines)) is not None]


def evaluation_curves(lines: Lines, gap: RewardJudgeGap | None) -> list[Figure]:
    """The judge's curves of the evaluations during training, and the gap between reward and judge."""
    makers: tuple[Callable[[Lines], Figure | None], ...] = (
        _judged,
        lambda _: None if gap is None else _gap(gap),
        lambda rows: _single(rows, "mean_length", "Length during training", "tokens", "evaluated-"),
    )
    return [figure for make in makers if (figure := make(lines)) is not None]


def _judged(lines: Lines) -> Figure | None:
    figure = go.Figure()
    for key, name, colour in (
        ("mean_toxicity", "mean toxicity", _JUDGE_COLOUR),
        ("share_toxic", "share toxic", SYSTEM_COLOURS[0]),
    ):
        x, y = _points(lines, key)
        if x:
            figure.add_scatter(x=x, y=y, name=name, line={"color": colour, "width": 2.2})
    figure.update_yaxes(rangemode="tozero")
    return _curve("evaluated", "Judge during training", "by the judge", figure, lines, "mean_toxicity")


def _gap(gap: RewardJudgeGap) -> Figure:
    figure = go.Figure()
    for name, values, colour, dash in (
        ("reward", gap.reward, _REWARD_COLOUR, "solid"),
        ("judge", gap.judge, _JUDGE_COLOUR, "solid"),
        ("gap", gap.gap, SYSTEM_COLOURS[-1], "dot"),
    ):
        figure.add_scatter(x=gap.steps, y=values, name=name, line={"color": colour, "width": 2, "dash": dash})
    figure.update_traces(mode="lines+markers", marker_size=5)
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="share of largest change")
    sentence = f"Gap {gap.gap[-1]:+.2f} at step {gap.steps[-1]}: 0 means that reward and judge improved alike."
    return page_figure("gap", "Reward against judge", sentence, figure)


def _reward(lines: Lines) -> Figure | None:
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
    return _curve("reward", "Reward", "reward per response", figure, lines, "reward")


def _logprob_gap(lines: Lines) -> Figure | None:
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
        "logprob_gap", "Rollout engine against learner", "|Δ log p|, nats per token", figure, lines, "logprob_gap_mean"
    )


def _time_split(lines: Lines) -> Figure | None:
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
    return page_figure("time", "Where the time went", f"In all: {', '.join(totals)}.", figure)


def _single(lines: Lines, key: str, title: str, unit: str, prefix: str = "") -> Figure | None:
    x, y = _points(lines, key)
    figure = go.Figure()
    figure.add_scatter(x=x, y=y, name=title, line={"color": _SERIES[0], "width": 2.2})
    figure.update_layout(showlegend=False)
    return _curve(prefix + key, title, unit, figure, lines, key)


def _curve(identity: str, title: str, unit: str, figure: go.Figure, lines: Lines, key: str) -> Figure | None:
    x, y = _points(lines, key)
    if not x or not figure.data:
        return None
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text=unit)
    figure.update_traces(mode="lines" if len(x) > 1 else "markers")
    return page_figure(identity, title, f"From {y[0]:.3g} at step {x[0]} to {y[-1]:.3g} at step {x[-1]}.", figure)


def _points(lines: Lines, key: str) -> tuple[list[Any], list[float]]:
    """Steps and values where the key is there and is a finite number."""
    kept = [
        (line["step"], line[key])
        for line in lines
        if isinstance(line.get(key), int | float)
        and math.isfinite(line[key])
        and isinstance(line.get("step"), int | float)
    ]
    return [step for step, _ in kept], [value for _, value in kept]
