import copy
import json

import pytest
from markupsafe import Markup

from detox_ray.evaluation.analysis_figures import (
    FELL_RGB,
    FULL_OPACITY,
    ROSE_RGB,
    Word,
    analysis_section,
    coloured_tokens,
)
from detox_ray.evaluation.tables import Cell

pytestmark = pytest.mark.unit

ATTACK = '"><script>alert(1)</script>'
MINUS = "\N{MINUS SIGN}"


def interval(value, spread=0.1):
    return {"value": value, "low": value - spread, "high": value + spread}


UNDEFINED = {"value": None, "low": None, "high": None}


@pytest.fixture
def analysis():
    """As analyze writes it; one response and one system's name attack the page."""
    tokens = [{"text": " you", "shift": -0.2}, {"text": ATTACK, "shift": -4.0}, {"text": " day", "shift": 1.5}]
    example = {
        "chosen": "fell",
        "system": "base",
        "prompt": ATTACK,
        "response": "...",
        "toxicity": 0.9,
        "shift": -2.7,
        "tokens": tokens,
    }
    return {
        "format": 1,
        "reference": "base",
        "systems": ["base", "tuned"],
        "model": "m",
        "judge": "words",
        "prompts": 20,
        "seed": 0,
        "threshold": 0.5,
        "skipped": {"empty response": 3},
        "logprobs": {
            "systems": {
                "base": {"all": interval(-3.0), "toxic": interval(-2.0), "civil": UNDEFINED},
                "tuned": {"all": interval(-3.5), "toxic": interval(-4.0), "civil": UNDEFINED},
            },
            "changes": {"tuned": {"all": interval(-0.5), "toxic": interval(-2.0), "civil": UNDEFINED}},
            "responses": {"all": 20, "toxic": 20, "civil": 0},
        },
        "entropy": {
            "systems": {"base": interval(4.0), "tuned": interval(3.95)},
            "changes": {"tuned": interval(-0.05)},
            "by_position": {
                s: [{"position": p, "responses": 20, **interval(4.0 + p)} for p in (1, 2, 3)] for s in ("base", "tuned")
            },
        },
        "attribution": {
            "prompts": 8,
            "steps": 24,
            "relative_error": 0.004,
            "systems": {s: {"prompt_entropy": interval(0.8), "prompt_share": interval(0.3)} for s in ("base", "tuned")},
            "changes": {"tuned": {"prompt_entropy": interval(-0.001), "prompt_share": interval(0.25)}},
        },
        "relevance": None,
        "words": {
            "min_count": 5,
            "systems": {
                "tuned": {
                    "less_likely": [{"word": "fool", "shift": -2.5, "count": 6, "toxic": True}],
                    "more_likely": [{"word": "day", "shift": 1.25, "count": 9, "toxic": False}],
                }
            },
        },
        "examples": {"tuned": [example]},
    }


def test_tokens_are_coloured_by_sign_and_size_and_never_markup(analysis):
    html = coloured_tokens(analysis["examples"]["tuned"][0])
    assert isinstance(html, Markup)
    assert "<script>" not in html
    assert html.striptags() == f"you{ATTACK} day"
    fell, strongest, rose = html.split("</span>")[:3]
    assert f"rgba({','.join(map(str, FELL_RGB))},0.04)" in fell
    assert f'title="{MINUS}0.20"> you' in fell
    assert f"rgba({','.join(map(str, FELL_RGB))},{FULL_OPACITY})" in strongest
    assert f"rgba({','.join(map(str, ROSE_RGB))},0.28)" in rose
    assert 'title="+1.50"' in rose


def luminance(rgb):
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("colour", [FELL_RGB, ROSE_RGB])
@pytest.mark.parametrize(
    ("card", "text"), [((255, 255, 255), (0x1D, 0x21, 0x26)), ((0x1C, 0x20, 0x24), (0xE8, 0xEA, 0xED))]
)
def test_text_is_readable_on_the_strongest_colour_in_light_and_dark(colour, card, text):
    """WCAG 2.2 asks for a contrast of 4.5; card and text are those of the report's page."""
    behind = tuple(FULL_OPACITY * c + (1 - FULL_OPACITY) * k for c, k in zip(colour, card, strict=True))
    dark, light = sorted((luminance(behind), luminance(text)))
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_sentences_say_what_moved_and_what_did_not(analysis):
    summary = analysis_section(analysis).summary
    interval_text = f"(95% interval {MINUS}2.10 to {MINUS}1.90)"
    assert summary == [
        f"The log-probability of base's toxic responses under tuned fell by 2.00 nats per token {interval_text}.",
        f"The entropy of tuned along its own responses did not change reliably: {MINUS}0.05 nats per token "
        f"(95% interval {MINUS}0.15 to +0.05).",
        "The prompt's share of the attribution under tuned rose by 0.25 (95% interval +0.15 to +0.35).",
    ]
    analysis["relevance"] = {"model": "encoder", "systems": {s: interval(0.5) for s in ("base", "tuned")}}
    analysis["relevance"]["changes"] = {"tuned": interval(-0.2)}
    section = analysis_section(analysis)
    assert "similarity of tuned's responses to their prompts fell by 0.20" in section.summary[-1]
    assert section.measures.rows[-1].label == "Similarity of prompt and response (encoder)"


def test_tables_hold_the_numbers(analysis):
    section = analysis_section(analysis)
    measures, (less, more) = section.measures, section.words
    assert [column.label for column in measures.columns] == ["Measure", "base", "tuned", "change, tuned"]
    cells = {row.label: row.cells for row in measures.rows}
    assert all(len(row) == 3 for row in cells.values())
    toxic = cells["Log-probability of base's toxic responses (20), nats per token"]
    assert toxic[2] == Cell(f"{MINUS}2.00", f"{MINUS}2.10 to {MINUS}1.90")
    assert cells["Log-probability of base's civil responses (0), nats per token"] == (Cell("n/a"),) * 3
    assert measures.rows[0].label == "Log-probability of base's responses (20), nats per token"
    assert cells["Attribution entropy over the prompt"][2] == Cell("+0.00", f"{MINUS}0.10 to +0.10")
    assert "3 empty response" in measures.note
    assert "8 of them" in measures.note
    assert less.words == [Word("fool", f"{MINUS}2.50", "6", is_veiled=True)]
    assert more.words == [Word("day", "+1.25", "9", is_veiled=False)]


def test_words_that_nobody_judged_are_veiled(analysis):
    analysis["judge"] = None
    analysis["words"]["systems"]["tuned"]["more_likely"] = [{"word": "<b>", "shift": 1.0, "count": 5, "toxic": None}]
    table = analysis_section(analysis).words[-1]
    assert table.words == [Word("<b>", "+1.00", "5", is_veiled=True)]
    assert "all are veiled" in table.note
    analysis["words"]["systems"]["tuned"]["more_likely"] = []
    assert len(analysis_section(analysis).words) == 1


def test_figures_show_the_numbers(analysis):
    figures = {figure.id: figure for figure in analysis_section(analysis).figures}
    specs = {name: json.loads(figure.spec) for name, figure in figures.items()}
    base, tuned = specs["analysis-logprobs"]["data"]
    assert (base["name"], base["x"], base["y"]) == ("base", ["all responses", "toxic responses"], [-3.0, -2.0])
    assert tuned["y"] == [-3.5, -4.0]
    assert tuned["error_y"]["array"] == pytest.approx([0.1, 0.1])
    band, line = specs["analysis-entropy"]["data"][:2]
    assert (line["x"], line["y"]) == ([1, 2, 3], [5.0, 6.0, 7.0])
    assert band["y"] == pytest.approx([5.1, 6.1, 7.1, 6.9, 5.9, 4.9])
    assert band["x"] == [1, 2, 3, 3, 2, 1]
    assert specs["analysis-attribution"]["data"][1]["y"] == [0.8, 0.3]
    assert all("<" not in figure.spec for figure in figures.values())


def test_a_hostile_name_stays_text(analysis):
    hostile = json.loads(json.dumps(analysis).replace('"tuned"', json.dumps(ATTACK)))
    section = analysis_section(hostile)
    assert "<script>" not in "".join(figure.spec for figure in section.figures)
    assert section.examples[0].heading.startswith("A response of base that fell most: ")
    assert not isinstance(section.examples[0].heading, Markup)


def test_several_tuned_systems_have_a_colour_each(analysis):
    more = copy.deepcopy(analysis)
    more["systems"].append("third")
    for part in ("logprobs", "entropy", "attribution"):
        more[part]["systems"]["third"] = more[part]["systems"]["tuned"]
        more[part]["changes"]["third"] = more[part]["changes"]["tuned"]
    more["entropy"]["by_position"]["third"] = more["entropy"]["by_position"]["tuned"]
    more["words"]["systems"]["third"] = more["words"]["systems"]["tuned"]
    more["examples"]["third"] = more["examples"]["tuned"]
    section = analysis_section(more)
    spec = json.loads(section.figures[0].spec)
    assert len({trace["marker"]["color"] for trace in spec["data"]}) == 3
    headings = [column.label for column in section.measures.columns]
    assert headings == ["Measure", "base", "tuned", "third", "change, tuned", "change, third"]
    assert len(section.examples) == 2
    assert len(section.summary) == 6
