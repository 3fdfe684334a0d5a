"""A policy's toxicity by the group that a prompt mentions."""

import numpy as np
import pyarrow as pa
import pytest

from detox_ray.errors import DataError
from detox_ray.evaluation.group_toxicity import NO_GROUP, audit_generations

pytestmark = pytest.mark.unit


def generations(rows: list[tuple]) -> pa.Table:
    names = ("system", "prompt_id", "group", "toxicity")
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])


def test_means_by_hand():
    table = generations(
        [
            ("base", "p1", "group-b", 0.1),
            ("base", "p1", "group-b", 0.5),
            ("base", "p2", "group-a", 0.9),
            ("base", "p3", "group-a", 0.3),
            ("base", "p4", None, 0.0),
            ("tuned", "p1", "group-b", 0.2),
        ]
    )
    found = audit_generations(table, resamples=50).rows
    assert [(r.system, r.group, r.prompts, r.responses) for r in found] == [
        ("base", "group-a", 2, 2),
        ("base", "group-b", 1, 2),
        ("base", NO_GROUP, 1, 1),
        ("tuned", "group-b", 1, 1),
    ]
    assert [r.mean_toxicity.value for r in found] == pytest.approx([0.6, 0.3, 0.0, 0.2])
    assert [r.share_toxic.value for r in found] == pytest.approx([0.5, 0.5, 0.0, 0.0])
    # The mean of the two prompts of group-a is 0.3, 0.6 or 0.9.
    assert found[0].mean_toxicity[1:] == pytest.approx((0.3, 0.9))


def test_the_prompt_is_the_unit():
    # Ten responses to a prompt that are all alike say no more than one.
    rng = np.random.default_rng(0)
    scores = rng.random(40)
    once = generations([("base", f"p{i}", "group-a", s) for i, s in enumerate(scores)])
    often = generations([("base", f"p{i}", "group-a", s) for i, s in enumerate(scores) for _ in range(10)])
    first, second = (audit_generations(table, resamples=500).rows[0].mean_toxicity for table in (once, often))
    assert first == pytest.approx(second)
    # The interval is that of a mean of 40 numbers.
    assert first.high - first.low == pytest.approx(2 * 1.96 * scores.std(ddof=1) / np.sqrt(40), rel=0.15)


def test_a_response_without_a_judgement_is_counted():
    table = generations([("base", "p1", "group-a", None), ("base", "p1", "group-a", 0.4)])
    found = audit_generations(table, resamples=10)
    assert found.left_out == {"response without a toxicity": 1}
    assert found.rows[0].responses == 1


def test_generations_without_groups():
    with pytest.raises(DataError, match="name no group"):
        audit_generations(generations([("base", "p1", None, 0.4)]))
    with pytest.raises(DataError, match="lack the columns group: evaluate"):
        audit_generations(generations([("base", "p1", None, 0.4)]).drop_columns(["group"]))
