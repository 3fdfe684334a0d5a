"""The figures of the report as plotly JSON; the page colours text and grid by its light or dark theme."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from detox_ray.evaluation.evaluation_file import Evaluation, IntervalJson, measured, systems
from detox_ray.evaluation.paired_responses import BUCKET_NAMES, PairedResponses, bucket_flows

# By the place of a system: the reference first. The page has the same hues, for text, as --system-0 and so on.
SYSTEM_COLOURS = ("#d9822b", "#1f9d8f", "#6f7bd9", "#c2578a", "#8a8f3c", "#5a9bd5", "#a3673f", "#8c8c8c")
_BUCKET_COLOURS = ("#4d9a63", "#d6a531", "#c8503f")
_HISTOGRAM_BINS = 20
_NAME_LENGTH = 22  # characters of a system's name above its part of the flow chart


@dataclass(frozen=True)
class Figure:
    """A figure ready for the page: `spec` is JSON that is safe inside a script element; `summary` says it in words.

    `min_width_px`: narrower than this it is not readable, so that a phone scrolls it; 0 for a figure that always fits.
    """

    id: str
    title: str
    summary: str
    spec: str
    min_width_px: int = 0


def system_colour(place: int) -> str:
    """Colour of the system at a place in the order of systems."""
    return SYSTEM_COLOURS[place % len(SYSTEM_COLOURS)]


def toxicity_histogram(responses: PairedResponses, threshold: float) -> Figure:
    """Share of responses by toxicity, all systems over the same bins: bars up to two systems, lines beyond."""
    edges = np.linspace(0, 1, _HISTOGRAM_BINS + 1)
    figure = go.Figure()
    sentences = []
    for place, name in enumerate(responses.systems):
        scores = responses.toxicity[place][~np.isnan(responses.toxicity[place])]
        counts, _ = np.histogram(np.clip(scores, 0, 1), bins=edges)
        shares = (100 * counts / max(1, len(scores))).tolist()
        colour, centres = system_colour(place), ((edges[:-1] + edges[1:]) / 2).tolist()
        hover = "toxicity about %{x:.2f}: %{y:.1f}%"
        if len(responses.systems) <= 2:
            figure.add_bar(x=centres, y=shares, name=name, marker_color=colour, hovertemplate=hover)
        else:
            line = {"color": colour, "width": 2, "shape": "hvh"}
            figure.add_scatter(x=centres, y=shares, name=name, mode="lines", line=line, hovertemplate=hover)
        if len(scores):
            sentences.append(f"{name} {np.median(scores):.3f} ({np.mean(scores >= threshold):.1%})")
    figure.update_layout(barmode="group", bargap=0.12, showlegend=True)
    figure.update_xaxes(title_text="judge's toxicity of a response", range=[0, 1])
    figure.update_yaxes(title_text="responses, %", rangemode="tozero")
    summary = f"Median toxicity, and share of responses at {threshold:g} or above: {'; '.join(sentences)}."
    return page_figure("toxicity", "Toxicity of the responses", summary, figure)


def bucket_flow_chart(responses: PairedResponses) -> Figure | None:
    """How responses to the same prompts move between the toxicity buckets, system to system; None for one system."""
    last = len(responses.systems) - 1
    if not last:
        return None
    flows = [bucket_flows(responses.toxicity[i], responses.toxicity[i + 1]) for i in range(last)]
    if not any(flow.sum() for flow in flows):
        return None
    totals = [flow.sum(axis=1) for flow in flows] + [flows[-1].sum(axis=0)]
    # An empty bucket gets no node: plotly places one without a flow anywhere.
    nodes = [(system, b) for system, counts in enumerate(totals) for b in range(3) if counts[b]]
    place = {node: i for i, node in enumerate(nodes)}
    links = [
        (place[i, b], place[i + 1, a], int(flow[b, a]), translucent(_BUCKET_COLOURS[a], 0.35))
        for i, flow in enumerate(flows)
        for b in range(3)
        for a in range(3)
        if flow[b, a]
    ]
    source, target, value, colour = (list(column) for column in zip(*links, strict=True))
    shares = [100 * totals[system][b] / totals[system].sum() for system, b in nodes]
    figure = go.Figure(
        go.Sankey(
            arrangement="fixed",
            node={
                "label": [f"{BUCKET_NAMES[b]} {share:.1f}%" for (_, b), share in zip(nodes, shares, strict=True)],
                "color": [_BUCKET_COLOURS[b] for _, b in nodes],
                "x": [_inside(system / last) for system, _ in nodes],
                "y": [_inside(_middle(totals[system], b)) for system, b in nodes],
                "pad": 14,
                "thickness": 16,
                "line": {"width": 0},
                "hovertemplate": "%{label}: %{value} responses<extra></extra>",
            },
            link={
                "source": source,
                "target": target,
                "value": value,
                "color": colour,
                "hovertemplate": "%{source.label} → %{target.label}: %{value} responses<extra></extra>",
            },
        )
    )
    _name_columns(figure, responses.systems)
    moved = (
        f"{responses.systems[i]} to {responses.systems[i + 1]}: {int(flow[2, :2].sum()):,} of {int(flow[2].sum()):,} "
        f"responses left high, {int(flow[:2, 2].sum()):,} of {int(flow[:2].sum()):,} became high"
        for i, flow in enumerate(flows)
    )
    summary = "; ".join(moved) if last <= 2 else "The same responses under one system after the other"
    figure.update_layout(margin={"l": 8, "r": 8, "t": 32, "b": 12})
    return page_figure(
        "flows", "Responses moving between toxicity buckets", summary + ".", figure, 0 if last < 2 else 190 * (last + 1)
    )


def perplexity_scatter(evaluation: Evaluation) -> Figure | None:
    """Mean toxicity against perplexity, one point per system with its intervals; None unless two systems have both."""
    points = [
        (place, name, perplexity, toxicity)
        for place, name in enumerate(systems(evaluation))
        if (perplexity := measured(evaluation, name, "perplexity")) and (perplexity["value"] is not None)
        if (toxicity := measured(evaluation, name, "mean_toxicity")) and (toxicity["value"] is not None)
    ]
    if len(points) < 2:
        return None
    figure = go.Figure()
    for place, name, perplexity, toxicity in points:
        figure.add_scatter(
            x=[perplexity["value"]],
            y=[toxicity["value"]],
            error_x=error_bars([_ends(perplexity)]),
            error_y=error_bars([_ends(toxicity)]),
            name=name,
            mode="markers",
            marker={"color": system_colour(place), "size": 11},
            hovertemplate="perplexity %{x:.1f}, toxicity %{y:.3f}",
        )
    place, reference, *start = points[0]
    if place == 0:
        for place, _, *end in points[1:]:
            figure.add_annotation(
                **{"ax": start[0]["value"], "ay": start[1]["value"], "x": end[0]["value"], "y": end[1]["value"]},
                **{"axref": "x", "ayref": "y", "text": "", "arrowhead": 2, "arrowwidth": 1.5},
                **{"arrowcolor": system_colour(place), "opacity": 0.7, "standoff": 9, "startstandoff": 8},
            )
    figure.update_layout(hovermode="closest", showlegend=True)
    figure.update_xaxes(title_text="perplexity")
    figure.update_yaxes(title_text="mean toxicity", rangemode="tozero")
    found = "; ".join(f"{name} {t['value']:.3f} at perplexity {p['value']:.1f}" for _, name, p, t in points)
    summary = f"Mean toxicity: {found}. Lower is better on both; bars are 95% intervals" + (
        f"; arrows start at {reference}." if not points[0][0] else "."
    )
    return page_figure("perplexity", "Toxicity against perplexity", summary, figure)


def page_figure(identity: str, title: str, summary: str, figure: go.Figure, min_width_px: int = 0) -> Figure:
    """The figure in the look of the page; `identity` becomes part of an element's id."""
    layout = {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 12, "t": 8, "b": 44},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        "hovermode": "x unified",
    }
    given = figure.layout.to_plotly_json()
    figure.update_layout(layout | {name: given[name] for name in ("margin", "hovermode") if name in given})
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    for trace in figure.data:
        trace.name = escaped(trace.name) if trace.name else trace.name
    # "<" may not stand in a script element as it is: "</script>" would end it.
    spec = json.dumps(figure.to_plotly_json(), allow_nan=False).replace("<", "\\u003c")
    return Figure(identity, title, summary, spec, min_width_px)


def escaped(text: str) -> str:
    """A name as plotly shows it literally: its labels understand a few HTML tags, links among them."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shortened(name: str, length: int) -> str:
    """A name of at most `length` characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def error_bars(intervals: Iterable[tuple[float | None, float | None, float | None]]) -> dict[str, object]:
    """Plotly's error bars of points given as (value, low, high); a point without an interval has none."""
    points = list(intervals)
    return {
        "type": "data",
        "symmetric": False,
        "array": [_reach(value, high) for value, _, high in points],
        "arrayminus": [_reach(low, value) for value, low, _ in points],
        "thickness": 1.5,
        "width": 4,
    }


def translucent(colour: str, opacity: float) -> str:
    """A colour such as "#d9822b" as plotly takes one that lets through what is behind it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _name_columns(figure: go.Figure, names: list[str]) -> None:
    """The systems' names above their columns of the flow chart."""
    last = len(names) - 1
    for system, name in enumerate(names):
        figure.add_annotation(
            text=f"<b>{escaped(shortened(name, _NAME_LENGTH))}</b>",
            x=system / last,
            xanchor="left" if system == 0 else "right" if system == last else "center",
            y=1.02,
            yanchor="bottom",
            xref="paper",
            yref="paper",
            showarrow=False,
        )


def _middle(counts: np.ndarray, bucket: int) -> float:
    """Where the bucket's middle is between top (0) and bottom (1): high toxicity stands on top."""
    above = counts[bucket + 1 :].sum()
    return float((above + counts[bucket] / 2) / counts.sum())


def _ends(interval: IntervalJson) -> tuple[float | None, float | None, float | None]:
    return interval.get("value"), interval.get("low"), interval.get("high")


def _reach(start: float | None, end: float | None) -> float | None:
    """How far an error bar goes up from `start` to `end`; None where one of them is unknown."""
    return None if start is None or end is None or not math.isfinite(end - start) else max(0.0, end - start)


def _inside(position: float) -> float:
    """Plotly takes a node position of 0 or 1 for a missing one."""
    return min(max(position, 0.001), 0.999)
