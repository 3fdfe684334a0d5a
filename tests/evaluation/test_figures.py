import json
import math

import numpy as np
import pyarrow as pa
import pytest
from report_folder import write_folder

from detox_ray.evaluation.evaluation_file import read_evaluation
from detox_ray.evaluation.figures import bucket_flow_chart, error_bars, perplexity_scatter, toxicity_histogram
from detox_ray.evaluation.paired_responses import PairedResponses, bucket_flows, share_on_different_sides

pytestmark = pytest.mark.unit


def paired(**toxicity):
    """Systems by name with a toxicity a response, each response of a prompt of its own."""
    values = np.array(list(toxicity.values()))
    texts = pa.chunked_array([["you fool"] * values.shape[1]])
    return PairedResponses(
        list(toxicity), np.arange(values.shape[1]).astype(str), values, {}, 1 - values, texts, [texts] * len(values)
    )


def spec(figure):
    return json.loads(figure.spec)


def test_bucket_flows_by_hand():
    """Low is below 0.33, medium includes both ends, high is above 0.66; a missing score is no flow."""
    before = np.array([0.0, 0.329, 0.33, 0.66, 0.661, 1.0, 0.9, np.nan, 0.5])
    after = np.array([0.0, 0.9, 0.5, 0.1, 0.66, 0.9, 0.2, 0.5, np.nan])
    assert bucket_flows(before, after).tolist() == [[1, 0, 1], [1, 1, 0], [1, 1, 1]]


def test_flow_chart_counts_from_system_to_system():
    figure = bucket_flow_chart(paired(base=[0.9, 0.9, 0.9, 0.1], sft=[0.9, 0.5, 0.1, 0.1], rlaf=[0.1, 0.1, 0.1, 0.1]))
    (sankey,) = spec(figure)["data"]
    names = sankey["node"]["label"]
    links = {
        (names[s], names[t]): v
        for s, t, v in zip(sankey["link"]["source"], sankey["link"]["target"], sankey["link"]["value"], strict=True)
    }
    assert links == {
        ("high 75.0%", "high 25.0%"): 1,
        ("high 75.0%", "medium 25.0%"): 1,
        ("high 75.0%", "low 50.0%"): 1,
        ("low 25.0%", "low 50.0%"): 1,
        ("high 25.0%", "low 100.0%"): 1,
        ("medium 25.0%", "low 100.0%"): 1,
        ("low 50.0%", "low 100.0%"): 2,
    }
    assert "base to sft: 2 of 3 responses left high, 0 of 1 became high" in figure.summary
    assert bucket_flow_chart(paired(base=[0.5])) is None


def test_names_are_no_markup_of_plotly():
    figure = bucket_flow_chart(paired(**{"<a href='x'>": [0.1], "b": [0.9]}))
    assert spec(figure)["layout"]["annotations"][0]["text"] == "<b>&lt;a href='x'&gt;</b>"
    assert "<" not in figure.spec


def test_histogram_shares():
    bars = spec(toxicity_histogram(paired(base=[0.01, 0.02, 0.97, 1.0], tuned=[0.0, 0.0, 0.0, np.nan]), 0.5))["data"]
    assert [trace["type"] for trace in bars] == ["bar", "bar"]
    assert (bars[0]["y"][0], bars[0]["y"][-1], sum(bars[0]["y"])) == (50, 50, 100)
    assert bars[1]["y"][0] == 100
    lines = spec(toxicity_histogram(paired(a=[0.1], b=[0.2], c=[0.3]), 0.5))["data"]
    assert [trace["type"] for trace in lines] == ["scatter"] * 3


def test_scatter_has_a_point_with_intervals_a_system_and_arrows_from_the_reference(tmp_path):
    content = read_evaluation(write_folder(tmp_path))
    drawn = spec(perplexity_scatter(content))
    assert [trace["name"] for trace in drawn["data"]] == ["base", "sft", "rlaf"]
    for trace in drawn["data"]:
        metrics = content["systems"][trace["name"]]["all"]
        assert trace["x"] == [metrics["perplexity"]["value"]]
        assert trace["y"] == [metrics["mean_toxicity"]["value"]]
        assert trace["error_x"]["array"] == pytest.approx([1.0])
        assert trace["error_y"]["arrayminus"] == pytest.approx([0.02])
    base = content["systems"]["base"]["all"]
    arrows = drawn["layout"]["annotations"]
    assert [(a["ax"], a["ay"]) for a in arrows] == [(base["perplexity"]["value"], base["mean_toxicity"]["value"])] * 2
    content["systems"]["rlaf"]["all"]["perplexity"] = {"value": None, "low": None, "high": None}
    assert len(spec(perplexity_scatter(content))["data"]) == 2
    del content["systems"]["sft"]["all"]["perplexity"]
    assert perplexity_scatter(content) is None


def test_error_bars_reach_from_the_value_to_the_ends():
    """No bar where an end is unknown or, as in a percentile interval, on the wrong side of the value."""
    bars = error_bars([(0.5, 0.25, 1.0), (0.5, 0.75, 1.0), (0.5, None, math.nan)])
    assert (bars["array"], bars["arrayminus"]) == ([0.5, 0.5, None], [0.25, 0.0, None])


def test_share_on_different_sides_by_hand():
    first, second = np.array([0.1, 0.5, 0.9, 0.2, np.nan]), np.array([0.4, 0.49, 0.7, 0.5, 0.9])
    assert share_on_different_sides([first, second], 0.5) == 0.5
    assert share_on_different_sides([first, second, np.array([0.9] * 5)], 0.5) == 0.75
    assert share_on_different_sides([np.array([np.nan]), np.array([0.1])], 0.5) is None
