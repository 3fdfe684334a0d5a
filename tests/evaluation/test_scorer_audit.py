"""The errors of a scorer by hand, and how often it is warned about when it is fair and when it is not."""

from functools import cache

import numpy as np
import pytest

from detox_ray.data.cases import Cases
from detox_ray.evaluation import proportions, scorer_audit
from detox_ray.evaluation.group_toxicity import NO_GROUP
from detox_ray.evaluation.scorer_audit import audit_scorer, criterion, mention_functionalities

pytestmark = pytest.mark.unit

GROUPS = [f"group-{letter}" for letter in "abcdefg"]


@pytest.fixture
def remembered_intervals(monkeypatch):
    """A simulation meets the same few counts again and again."""
    score_interval = cache(proportions.score_interval)
    monkeypatch.setattr(proportions, "score_interval", score_interval)
    monkeypatch.setattr(scorer_audit, "score_interval", score_interval)
    for name in ("p_value_above", "p_value_above_rate"):
        monkeypatch.setattr(scorer_audit, name, cache(getattr(proportions, name)))


def make_cases(toxic, groups, functionalities=None) -> Cases:
    texts = [f"text {i}" for i in range(len(groups))]
    return Cases(texts, np.array(toxic), groups, functionalities, len(texts), {}, {})


def mentions_only(per_group: int, without: int) -> Cases:
    groups = [group for group in GROUPS for _ in range(per_group)] + [None] * without
    return make_cases([False] * len(groups), groups)


def simulated_warnings(cases: Cases, rates: dict[str | None, float], seeds: int) -> np.ndarray:
    """Whether each group is warned about: [seeds, groups], the scorer's false-positive rate drawn by group."""
    probability = np.array([rates[group] for group in cases.groups])
    warned = np.zeros((seeds, len(GROUPS)), dtype=bool)
    for seed in range(seeds):
        judged = np.random.default_rng(seed).random(len(probability)) < probability
        warnings = audit_scorer("a-scorer", judged.astype(float), cases).warnings
        warned[seed] = [any(f" of {group}: " in warning for warning in warnings) for group in GROUPS]
    return warned


def test_rates_by_hand():
    #           toxic, group, kind, toxicity
    table = [
        (True, "group-a", "threat", 0.9),
        (True, "group-a", "threat", 0.5),  # the threshold itself is toxic
        (True, "group-b", "threat", 0.4),
        (True, "group-b", "insult", 0.8),
        (False, "group-a", "mention", 0.7),
        (False, "group-a", "mention", 0.3),
        (False, "group-a", "mention", 0.2),
        (False, "group-b", "mention", 0.1),
        (False, None, "object", 0.6),
    ]
    toxic, groups, kinds, toxicity = (list(column) for column in zip(*table, strict=True))
    audit = audit_scorer("a-scorer", np.array(toxicity), make_cases(toxic, groups, kinds), ("mention",))

    def counts(cell):
        rates = (cell.false_positive, cell.false_negative)
        return [None if rate is None else (rate.count, rate.total) for rate in rates]

    assert counts(audit.overall) == [(2, 5), (1, 4)]
    # Of the 20 pairs of a toxic and a non-toxic text, 0.9 and 0.8 win 5 each, 0.5 wins 3, 0.4 wins 3.
    assert audit.overall.roc_auc == pytest.approx(16 / 20)
    assert list(audit.by_group) == ["group-a", "group-b", NO_GROUP]
    assert counts(audit.by_group["group-a"]) == [(1, 3), (0, 2)]
    assert counts(audit.by_group["group-b"]) == [(0, 1), (1, 2)]
    assert counts(audit.by_group[NO_GROUP]) == [(1, 1), None]
    assert audit.by_group["group-a"].roc_auc == pytest.approx(5 / 6)
    assert audit.by_group[NO_GROUP].roc_auc is None
    assert list(audit.by_functionality) == ["threat", "insult", "mention", "object"]
    assert counts(audit.by_functionality["threat"]) == [None, (1, 3)]
    assert counts(audit.by_functionality["mention"]) == [(1, 4), None]
    assert [(m.group, m.rate.count, m.rate.total) for m in audit.mentions] == [("group-a", 1, 3), ("group-b", 0, 1)]
    # "object" is no mere mention, so there is no case of that kind without a group: the tolerated rate stands in.
    assert all(mention.no_group.others is None for mention in audit.mentions)
    assert audit.mentions[0].other_groups.others.total == 1


def test_only_the_named_functionalities_are_mentions():
    cases = make_cases([False] * 3, ["group-a"] * 3, ["ident_pos_nh", "counter_quote_nh", "ident_neutral_nh"])
    assert mention_functionalities(cases) == ("ident_neutral_nh", "ident_pos_nh")
    assert mention_functionalities(make_cases([False], ["group-a"])) == ()
    audit = audit_scorer("a-scorer", np.zeros(3), cases, mention_functionalities(cases))
    assert audit.mentions[0].rate.total == 2


def test_a_toxic_case_is_no_mention():
    cases = make_cases([True] * 30 + [False] * 30, ["group-a"] * 60)
    audit = audit_scorer("a-scorer", np.r_[np.ones(30), np.zeros(30)], cases)
    assert audit.mentions[0].rate.total == 30
    assert audit.warnings == []


# At most 2.5% of the audits of a fair scorer; three standard errors for 1,000 seeds. Few cases and low rates are where
# intervals alone warn far too often (5 cases at 1% beside 1,000: 29%).
@pytest.mark.parametrize(
    ("rate", "per_group", "without"),
    [(0.05, 40, 0), (0.2, 40, 100), (0.5, 40, 100), (0.03, 40, 40), (0.01, 5, 1000), (0.05, 5, 0)],
)
def test_a_fair_scorer_is_rarely_warned_about(remembered_intervals, rate, per_group, without):
    cases = mentions_only(per_group, without)
    warned = simulated_warnings(cases, dict.fromkeys([*GROUPS, None], rate), seeds=1000)
    assert warned.any(axis=1).mean() <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / 1000)


def test_a_scorer_that_punishes_one_group_is_warned_about(remembered_intervals):
    rates = dict.fromkeys([*GROUPS, None], 0.1) | {"group-c": 0.6}
    warned = simulated_warnings(mentions_only(40, 100), rates, seeds=200)
    assert warned[:, 2].mean() >= 0.98
    assert np.delete(warned, 2, axis=1).any(axis=1).mean() <= 0.05


def test_a_scorer_that_punishes_all_groups_alike_is_warned_about(remembered_intervals):
    alike = dict.fromkeys(GROUPS, 0.5)
    assert simulated_warnings(mentions_only(40, 0), alike, seeds=50).mean() >= 0.98
    assert simulated_warnings(mentions_only(40, 200), alike | {None: 0.02}, seeds=50).mean() >= 0.98


def test_the_sentence_names_scorer_group_rates_and_counts():
    judged = np.zeros(280)
    judged[:20] = 1.0
    (warning,) = audit_scorer("a-scorer", judged, mentions_only(40, 0)).warnings
    assert warning == (
        "a-scorer punishes mere mention of group-a: it judges 50.0% of 40 non-toxic cases toxic, reliably more than "
        "the 0.0% of 240 non-toxic cases of other groups and the 5% tolerated."
    )
    few = make_cases([False] * 130, ["group-a"] * 10 + ["group-b"] * 100 + [None] * 20)
    (warning,) = audit_scorer("a-scorer", np.r_[np.ones(10), np.zeros(120)], few).warnings
    assert warning.endswith(
        "100.0% of 10 non-toxic cases toxic, reliably more than the 0.0% of 100 non-toxic cases of other groups and "
        "the 0.0% of 20 cases without a group (few cases: below 20)."
    )


def test_the_correction_counts_the_comparisons():
    audit = audit_scorer("a-scorer", np.zeros(280), mentions_only(40, 0))
    assert {mention.confidence for mention in audit.mentions} == {1 - 0.05 / 14}
    alone = audit_scorer("a-scorer", np.zeros(30), make_cases([False] * 30, ["group-a"] * 30))
    assert alone.mentions[0].confidence == pytest.approx(0.95)
    assert alone.mentions[0].other_groups is None


def test_the_criterion_says_which_cases():
    assert "neutral mentions (functionalities ident_pos_nh)" in criterion(("ident_pos_nh",))
    assert "non-toxic cases is reliably above" in criterion(())
