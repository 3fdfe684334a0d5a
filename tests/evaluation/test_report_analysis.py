"""The part of a report that `detox-ray analyze` adds."""

import json

import pytest
from report_folder import ATTACK, JUDGE, interval
from report_page import Page, specs

from detox_ray.errors import DataError
from detox_ray.evaluation.report import write_report

pytestmark = pytest.mark.unit


def an_analysis():
    """As analyze writes it, of two systems; an example attacks the page."""

    def of_splits(value):
        return {split: interval(value) for split in ("all", "toxic", "civil")}

    def measures(value):
        return {"prompt_entropy": interval(value), "prompt_share": interval(value)}

    tokens = [{"text": " you", "shift": -0.2}, {"text": ATTACK, "shift": -4.0}]
    example = {"chosen": "fell", "system": "base", "prompt": ATTACK, "response": "...", "toxicity": 0.9}
    words = {"less_likely": [{"word": "foolish", "shift": -2.5, "count": 6, "toxic": True}]}
    words["more_likely"] = [{"word": "<b>", "shift": 1.5, "count": 7, "toxic": False}]
    names = ("base", "tuned")
    positions = [{"position": p, "responses": 20, **interval(4.0)} for p in (1, 2)]
    return {
        **{"format": 1, "reference": "base", "systems": list(names), "model": "m", "judge": JUDGE, "prompts": 20},
        **{"seed": 0, "threshold": 0.5, "skipped": {}, "relevance": None},
        "logprobs": {
            "systems": {"base": of_splits(-3.0), "tuned": of_splits(-4.25)},
            "changes": {"tuned": of_splits(-1.25)},
            "responses": {"all": 20, "toxic": 10, "civil": 10},
        },
        "entropy": {
            "systems": {name: interval(4.0) for name in names},
            "changes": {"tuned": interval(0.0)},
            "by_position": {name: positions for name in names},
        },
        "attribution": {
            **{"prompts": 8, "steps": 24, "relative_error": 0.004},
            "systems": {name: measures(0.5) for name in names},
            "changes": {"tuned": measures(0.0)},
        },
        "words": {"min_count": 5, "systems": {"tuned": words}},
        "examples": {"tuned": [example | {"shift": -2.7, "tokens": tokens}]},
    }


def test_analysis_has_its_section(pair):
    (pair / "analysis.json").write_text(json.dumps(an_analysis()))
    html = write_report(pair).read_text()
    twin = (pair / "report.md").read_text()
    fell = "\N{MINUS SIGN}1.25 (\N{MINUS SIGN}1.27 to \N{MINUS SIGN}1.23)"
    assert fell in twin
    assert "\N{MINUS SIGN}1.25<small>\N{MINUS SIGN}1.27\N{NO-BREAK SPACE}to \N{MINUS SIGN}1.23</small>" in html
    assert {"analysis-logprobs", "analysis-entropy", "analysis-attribution"} <= specs(html).keys()
    assert ATTACK not in html
    page = Page(html)
    assert "coloured-1" in page.controls
    assert ".veiled" in html
    assert '<th scope="row"><span class="veiled" tabindex="0">foolish</span></th>' in html
    assert '<th scope="row">&lt;b&gt;</th>' in html
    assert "foolish" not in twin


def test_a_broken_analysis_names_itself(pair):
    for content in ("{", "[]", '{"format": 99}'):
        (pair / "analysis.json").write_text(content)
        with pytest.raises(DataError, match=r"analysis\.json is not .*analyse again, or remove it"):
            write_report(pair)
