"""What analysis.json says, for the report: figures, tables, words and coloured text; needs no model."""

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from detox_ray.evaluation.figures import Figure, error_bars, page_figure, system_colour, translucent
from detox_ray.evaluation.metric_format import MINUS, UNKNOWN
from detox_ray.evaluation.tables import Cell, Column, Row, Table

FULL_COLOUR_NATS = 3.0  # a shift of e^3, twenty times as likely or unlikely, has the strongest colour
FULL_OPACITY = 0.55  # the page's text stays readable on it, in light and dark
FELL_RGB, ROSE_RGB = (217, 130, 43), (31, 157, 143)
_SPLITS = {"all": "all responses", "toxic": "toxic responses", "civil": "civil responses"}
_MEASURES = {
    "prompt_entropy": "Attribution entropy over the prompt",
    "prompt_share": "Share of attribution on the prompt",
}
_CHOSEN = {
    "fell": "a response of {reference} that fell most",
    "rose": "a response of {tuned} that rose most",
    "random": "a response of {reference}, drawn at random",
}

# For the page's head. A veiled word shows while it is pointed at or has the focus; in print it stays veiled.
STYLE = Markup("""
.token { border-radius: 3px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.veiled { filter: blur(5px); }
.veiled:hover, .veiled:focus { filter: none; }
""")


@dataclass(frozen=True)
class Word:
    """A word with the change of its log-probability and how often it occurs; a veiled one wants hiding."""

    text: str
    shift: str
    count: str
    is_veiled: bool


@dataclass(frozen=True)
class WordTable:
    """Words that became more likely, or less; the strongest first."""

    title: str
    note: str
    words: list[Word]


@dataclass(frozen=True)
class ColouredExample:
    """A response in which every token is coloured by its shift; prompt and response can be toxic and want hiding."""

    heading: str
    prompt: str
    toxicity: float
    response: Markup


@dataclass(frozen=True)
class AnalysisSection:
    """The part of the report about what changed; `style` is what words and examples need."""

    summary: list[str]
    figures: list[Figure]
    measures: Table
    words: list[WordTable]
    examples: list[ColouredExample]
    style: Markup


def analysis_section(analysis: dict[str, Any]) -> AnalysisSection:
    """Everything that the report shows of analysis.json."""
    tuned = [system for system in analysis["systems"] if system != analysis["reference"]]
    return AnalysisSection(
        summary=[sentence for system in tuned for sentence in _sentences(analysis, system)],
        figures=[_logprob_figure(analysis), _entropy_figure(analysis), _attribution_figure(analysis)],
        measures=_measure_table(analysis),
        words=[table for system in tuned for table in _word_tables(analysis, system)],
        examples=[_example(analysis, system, example) for system in tuned for example in analysis["examples"][system]],
        style=STYLE,
    )


def coloured_tokens(example: dict[str, Any]) -> Markup:
    """The text of an example of analysis.json, each token on a colour for its shift, the number in its title."""
    return Markup("").join(_coloured_token(token["text"], token["shift"]) for token in example["tokens"])


def _coloured_token(text: str, shift: float) -> Markup:
    red, green, blue = ROSE_RGB if shift > 0 else FELL_RGB
    opacity = FULL_OPACITY * min(1.0, abs(shift) / FULL_COLOUR_NATS)
    return Markup('<span class="token" style="background-color:rgba({},{},{},{:.2f})" title="{}">{}</span>').format(
        red, green, blue, opacity, _signed(shift), text
    )


def _example(analysis: dict[str, Any], tuned: str, example: dict[str, Any]) -> ColouredExample:
    heading = _CHOSEN[example["chosen"]].format(tuned=tuned, reference=analysis["reference"])
    heading = f"{heading[0].upper()}{heading[1:]}: {_signed(example['shift'])} nats under {tuned}"
    return ColouredExample(heading, example["prompt"], example["toxicity"], coloured_tokens(example))


def _sentences(analysis: dict[str, Any], tuned: str) -> list[str]:
    """What the numbers say of one tuned system, as far as they are defined."""
    reference, relevance = analysis["reference"], analysis["relevance"]
    changes = analysis["logprobs"]["changes"][tuned]
    nats = " nats per token"
    stated = [
        (f"The log-probability of {reference}'s toxic responses under {tuned}", changes["toxic"], nats),
        (f"The log-probability of {reference}'s civil responses under {tuned}", changes["civil"], nats),
        (f"The entropy of {tuned} along its own responses", analysis["entropy"]["changes"][tuned], nats),
        (
            f"The prompt's share of the attribution under {tuned}",
            analysis["attribution"]["changes"][tuned]["prompt_share"],
            "",
        ),
    ]
    if relevance:
        stated.append((f"The similarity of {tuned}'s responses to their prompts", relevance["changes"][tuned], ""))
    return [f"{what} {_moved(change, unit)}." for what, change, unit in stated if change["value"] is not None]


def _moved(change: dict[str, float | None], unit: str) -> str:
    """ "fell by 1.23 (95% interval ...)", or that the interval contains 0."""
    value, low, high = change["value"] or 0.0, change["low"], change["high"]
    if low is None or high is None:
        return f"changed by {_signed(value)}{unit}"
    interval = f"(95% interval {_signed(low)} to {_signed(high)})"
    if low <= 0 <= high:
        return f"did not change reliably: {_signed(value)}{unit} {interval}"
    return f"{'rose' if value > 0 else 'fell'} by {_plain(abs(value))}{unit} {interval}"


def _measure_table(analysis: dict[str, Any]) -> Table:
    tuned = [system for system in analysis["systems"] if system != analysis["reference"]]
    logprobs, attribution = analysis["logprobs"], analysis["attribution"]
    sections = [
        (
            f"Log-probability of {analysis['reference']}'s {label.removeprefix('all ')} "
            f"({logprobs['responses'][split]}), nats per token",
            {system: values[split] for system, values in logprobs["systems"].items()},
            {system: values[split] for system, values in logprobs["changes"].items()},
        )
        for split, label in _SPLITS.items()
    ]
    sections.append(("Entropy, nats per token", analysis["entropy"]["systems"], analysis["entropy"]["changes"]))
    sections += [
        (
            label,
            {system: values[name] for system, values in attribution["systems"].items()},
            {system: values[name] for system, values in attribution["changes"].items()},
        )
        for name, label in _MEASURES.items()
    ]
    if relevance := analysis["relevance"]:
        label = f"Similarity of prompt and response ({relevance['model']})"
        sections.append((label, relevance["systems"], relevance["changes"]))
    rows = [
        Row(
            label,
            (
                *(_cell(systems[system]) for system in analysis["systems"]),
                *(_cell(changes[system], signed=True) for system in tuned),
            ),
        )
        for label, systems, changes in sections
    ]
    note = (
        f"{analysis['prompts']} prompts, one response of each system; attribution by integrated gradients on "
        f"{attribution['prompts']} of them (median relative error of the integral "
        f"{attribution['relative_error']:.1%}). 95% bootstrap intervals over prompts."
    )
    if analysis["skipped"]:
        note += f" Passed over: {', '.join(f'{count} {reason}' for reason, count in analysis['skipped'].items())}."
    headings = ["Measure", *analysis["systems"], *(f"change, {system}" for system in tuned)]
    columns = tuple(Column(heading) for heading in headings)
    return Table("analysis", "What changed inside", columns, tuple(rows), note)


def _word_tables(analysis: dict[str, Any], tuned: str) -> list[WordTable]:
    judge = analysis["judge"]
    veiled = f"those that {judge} finds toxic are veiled" if judge else "all are veiled, as no judge has seen them"
    note = (
        f"Mean change of the word's log-probability in nats, in the responses of {analysis['reference']} and {tuned}; "
        f"words that occur at least {analysis['words']['min_count']} times, {veiled}."
    )
    return [
        WordTable(f"Words that became {label} under {tuned}", note, words)
        for key, label in (("less_likely", "less likely"), ("more_likely", "more likely"))
        if (words := [_word(row) for row in analysis["words"]["systems"][tuned][key]])
    ]


def _word(row: dict[str, Any]) -> Word:
    # Where no judge was at hand a word is not known to be harmless.
    return Word(row["word"], _signed(row["shift"]), str(row["count"]), is_veiled=row["toxic"] is not False)


def _logprob_figure(analysis: dict[str, Any]) -> Figure:
    figure = go.Figure()
    logprobs = analysis["logprobs"]
    for colour, system in zip(_colours(analysis), analysis["systems"], strict=True):
        there = [s for s in _SPLITS if logprobs["systems"][system][s]["value"] is not None]
        _add_points(
            figure, system, [_SPLITS[s] for s in there], [logprobs["systems"][system][s] for s in there], colour
        )
    figure.update_layout(scattermode="group")
    figure.update_yaxes(title_text="log-probability, nats per token")
    responses = f"{analysis['reference']}'s responses"
    summary = (
        f"Mean log-probability of a token of {responses} under every system, with 95% intervals. Over all of them it "
        "is bound to fall, by the KL divergence, so what tells is toxic against civil."
    )
    return page_figure("analysis-logprobs", f"How likely {responses} are", summary, figure)


def _entropy_figure(analysis: dict[str, Any]) -> Figure:
    figure = go.Figure()
    for colour, system in zip(_colours(analysis), analysis["systems"], strict=True):
        points = analysis["entropy"]["by_position"][system]
        positions = [point["position"] for point in points]
        band = [point["high"] for point in points] + [point["low"] for point in reversed(points)]
        figure.add_scatter(
            x=positions + positions[::-1],
            y=band,
            fill="toself",
            line={"width": 0, "color": colour},
            fillcolor=translucent(colour, 0.18),
            hoverinfo="skip",
            showlegend=False,
            legendgroup=system,
        )
        figure.add_scatter(
            x=positions,
            y=[point["value"] for point in points],
            name=system,
            legendgroup=system,
            mode="lines",
            line={"color": colour, "width": 2.2},
        )
    figure.update_xaxes(title_text="token of the response")
    figure.update_yaxes(title_text="entropy, nats", rangemode="tozero")
    summary = (
        "Mean entropy of the next token along each system's own responses, with 95% bands: low is decided, 0 is fixed."
    )
    return page_figure("analysis-entropy", "Entropy along the response", summary, figure)


def _attribution_figure(analysis: dict[str, Any]) -> Figure:
    figure = go.Figure()
    attribution = analysis["attribution"]
    labels = {"prompt_entropy": "entropy over the prompt", "prompt_share": "share on the prompt"}
    for colour, system in zip(_colours(analysis), analysis["systems"], strict=True):
        there = [m for m in labels if attribution["systems"][system][m]["value"] is not None]
        _add_points(
            figure, system, [labels[m] for m in there], [attribution["systems"][system][m] for m in there], colour
        )
    figure.update_layout(scattermode="group")
    figure.update_yaxes(range=[0, 1])
    summary = (
        "Entropy of the attribution over the prompt's tokens (1: all are read alike) and the prompt's share of it "
        "(the rest is on the response so far), with 95% intervals."
    )
    return page_figure("analysis-attribution", "Is the prompt still read", summary, figure)


def _add_points(figure: go.Figure, name: str, x: list[str], intervals: list[dict[str, float]], colour: str) -> None:
    figure.add_scatter(
        x=x,
        y=[interval["value"] for interval in intervals],
        name=name,
        mode="markers",
        marker={"color": colour, "size": 9},
        error_y=error_bars((interval["value"], interval["low"], interval["high"]) for interval in intervals),
    )


def _colours(analysis: dict[str, Any]) -> list[str]:
    """One per system, the reference first."""
    return [system_colour(number) for number in range(len(analysis["systems"]))]


def _cell(interval: dict[str, float | None], signed: bool = False) -> Cell:
    value, low, high = interval["value"], interval["low"], interval["high"]
    if value is None:
        return Cell(UNKNOWN)
    shown = _signed if signed else _plain
    return Cell(shown(value), "" if low is None or high is None else f"{shown(low)} to {shown(high)}")


def _plain(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", MINUS)


def _signed(value: float) -> str:
    # Adding 0 makes of a rounded minus zero a plain one.
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", MINUS)
